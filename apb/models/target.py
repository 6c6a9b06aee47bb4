"""A model as a draft head's target: embedding, LM head and rotation of its own.

Shapes: B batch, H heads, S tokens, D head dim, W vocabulary, E hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apb.draft.base import RotateTo, Target
from apb.models.ends import Ends
from apb.models.rope import replaced
from apb.models.rotation import Rotation
from apb.plan.shapes import ModelShape
from burst.errors import UserError


def draft_target(model: Any, shape: ModelShape, ends: Ends, rotation: Rotation, rotary: nn.Module | None) -> Target:
    """Return what draft heads share with a model; ``rotary``: its rotary embedding, None where nothing is rotated.

    Raises UserError when the model does more round its decoder than scale embeddings and scale and cap logits.
    """
    name, head = type(model).__name__, model.get_output_embeddings()

    def turning(by: nn.Module | None) -> RotateTo:
        def rotate(x_BHSD: Tensor, positions: Tensor) -> Tensor:
            return rotation.turned(x_BHSD, positions if positions.dim() == 2 else positions[None], by)

        return rotate

    def rotated_by(parameters: Mapping[str, Any]) -> RotateTo:
        if rotary is None:
            raise own_end(name, "in place of RoPE")
        config = copy.deepcopy(model.config)
        config.rope_parameters = replaced(config.rope_parameters, parameters)
        made: Any = type(rotary)
        return turning(made(config=config).to(model.device))

    if ends.embedding_scale is None:
        raise own_end(name, "before its first layer")
    if ends.logit_scale is None:
        raise own_end(name, "after its LM head")
    return Target(
        name=name,
        shape=shape,
        embedding_WE=model.get_input_embeddings().weight.detach(),
        head_WE=head.weight.detach(),
        head_bias_W=None if head.bias is None else head.bias.detach(),
        embedding_scale=ends.embedding_scale,
        logit_scale=ends.logit_scale,
        soft_cap=ends.soft_cap,
        rotate=turning(rotary),
        rotation=rotated_by,
    )


def own_end(name: str, where: str) -> UserError:
    """Return the error for a model that does something unknown round its decoder."""
    return UserError(
        f"neither training nor draft heads can be had for {name}: it does something of its own {where}",
        given=name,
        allowed="models that scale embeddings, and scale and cap logits",
        remedy="Choose another model, or decode=lookup, which needs no head.",
    )
