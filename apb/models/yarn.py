"""YaRN by a factor that is not config.json's: for models with plain RoPE that are published to be stretched so."""

from __future__ import annotations

import copy
from typing import Any

from apb.models.rope import rope_parameters
from burst.errors import UserError


def yarn_base(config: Any) -> int:
    """Return how many positions a model has before it is stretched; raises UserError where its RoPE is not plain.

    A model whose config.json has YaRN may have been trained with it, and would be another with another factor.
    """
    ropes, limit = rope_parameters(config), getattr(config, "max_position_embeddings", None)
    kinds = [rope.get("rope_type", "default") for rope in ropes]
    if getattr(config, "position_embedding_type", "rope") != "rope":  # Granite 4 states a RoPE that it does not use
        kinds = []
    if kinds != ["default"] or getattr(config, "rope_parameters", None) is not ropes[0] or type(limit) is not int:
        raise UserError(
            "YaRN's factor can be set for models with plain RoPE only",
            given=f"model_type={getattr(config, 'model_type', '?')} with rope_type {', '.join(kinds) or 'none'}",
            allowed="one RoPE for all layers, of type default in config.json",
            remedy="Leave yarn out: the model is used as its config.json says.",
        )
    return limit


def with_yarn(config: Any, factor: int | None) -> Any:
    """Return the configuration stretched by ``factor``; None and 1: as it is. Raises UserError as ``yarn_base``."""
    if factor is None or factor == 1:
        return config
    base, out = yarn_base(config), copy.deepcopy(config)
    stretched = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": base}
    out.rope_parameters = {**config.rope_parameters, **stretched}
    out.max_position_embeddings = base * factor
    return out
