"""Sizes of a model, from its configuration alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from apb.layers.latent import Latent
from apb.layers.softmax import Softmax
from apb.layers.window import Window
from apb.models.classes import causal_lm, decoder
from apb.models.files import first_line
from apb.models.kinds import layer_kinds
from apb.models.rope import rope_parameters
from apb.plan.shapes import ModelShape
from burst.errors import UserError


def model_shape(config: Any, dtype: torch.dtype) -> ModelShape:
    """Return the shape of the model that ``config`` describes, its activations in ``dtype``; loads no weights.

    The parameters are counted on a model without storage, so every architecture counts right; a mixture of experts is
    charged for the experts that one token visits. Raises UserError when no decoder can be made of the configuration.
    """
    with _skeleton(config) as model:
        return _counted(model, config, dtype)


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that ``config`` describes; raises as ``model_shape``."""
    with _skeleton(config) as model:
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@contextmanager
def _skeleton(config: Any) -> Iterator[PreTrainedModel]:
    """Yield the model without storage; raises UserError for a configuration of which none can be made or counted."""
    try:
        with torch.device("meta"):
            model = causal_lm().from_config(copy.deepcopy(config), trust_remote_code=False)
        yield model
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # architectures read configurations each in its own way; what is wrong is in this file
        folder = getattr(config, "_name_or_path", "")
        file = f"{folder}/config.json" if folder else "model.config"
        raise UserError(
            f"no decoder can be made of the model's configuration {file} ({first_line(error)})",
            given=f"{file} of type {getattr(config, 'model_type', '?')}",
            allowed="configurations of causal decoders that the installed transformers can build",
            remedy="Choose another model, or mend its config.json.",
        ) from error


def _counted(model: PreTrainedModel, config: Any, dtype: torch.dtype) -> ModelShape:
    if type(config.num_hidden_layers) is not int or config.num_hidden_layers < 1:
        raise ValueError(f"layers is {config.num_hidden_layers}")
    kinds = layer_kinds(decoder(model), config)  # first: a model without known layers may name its sizes otherwise too
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    outside = {id(p) for m in (embedding, head) for p in m.parameters()}
    visited, total, linear, inner = _visited(config), 0, 0, 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if id(parameter) not in outside and parameter.dim() > 1:
            # All experts of a layer are one tensor; the down projection (E, hidden, inner) says how wide one is.
            stacked = parameter.dim() == 3 and ".experts." in name
            linear += round(parameter.numel() * visited / len(parameter)) if stacked else parameter.numel()
            if stacked and "down" in name:
                inner = max(inner, parameter.numel() // len(parameter) // config.hidden_size)
    shape = ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=max(_widest_mlp(model), visited * inner) or int(config.intermediate_size),
        mixers=kinds,
        vocab=config.vocab_size,
        linear_params=linear,
        head_params=_weights(head),
        total_params=total,
        element_size=dtype.itemsize,
        max_positions=position_limit(config),
        rope_border=rope_border(config),
        expert_row_bytes=visited * _expert_bytes(config.hidden_size, inner, dtype.itemsize) if inner else 0,
    )
    sizes = [(name, getattr(shape, name)) for name in ("layers", "hidden", "intermediate", "vocab", "max_positions")]
    for kind in shape.kinds:
        if isinstance(kind, Softmax):
            sizes += [
                (f"{kind.name} {name}", getattr(kind, name)) for name in ("q_heads", "kv_heads", "qk_dim", "v_dim")
            ]
            if kind.q_heads % max(1, kind.kv_heads):
                raise ValueError(f"{kind.q_heads} query heads for {kind.kv_heads} of keys and values")
        if isinstance(kind, Window):
            sizes += [("attention_chunk_size" if kind.chunked else "sliding_window", kind.window)]
        if isinstance(kind, Latent):
            sizes += [(f"{kind.name} {name}", size) for name, size in asdict(kind).items()]
    for name, size in sizes:
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} is {size}")
    return shape


def position_limit(config: Any) -> int:
    """Return how many positions a model takes by its configuration.

    YaRN takes its original ones times its factor, whether max_position_embeddings was raised with them or not. Of other
    kinds it is what the configuration says: Llama 3's is the scaled one already, and of ``linear`` both are published.
    """
    limit: int = config.max_position_embeddings
    scaled: list[int] = []
    for rope in rope_parameters(config):
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "yarn" and factor is not None and original is not None:
            scaled.append(int(original * factor))
        else:
            scaled.append(limit)
    return max([limit, min(scaled, default=limit)])


def rope_border(config: Any) -> int | None:
    """Return how many tokens a sequence has at most where RoPE depends on its length; None where it does not."""
    for rope in rope_parameters(config):
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
    return None


def _visited(config: Any) -> int:
    """Return how many experts a token visits."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
    return next((found for name in names if (found := getattr(config, name, None))), 1)


def _widest_mlp(model: PreTrainedModel) -> int:
    """Return the width of the widest plain MLP, a shared expert or a dense layer; 0 where there is none."""
    inner = [m.in_features for name, m in model.named_modules() if _is_down(name) and isinstance(m, nn.Linear)]
    return max(inner, default=0)


def _is_down(name: str) -> bool:
    return name.rpartition(".")[2] in ("down_proj", "w2", "fc2", "output_linear", "dense_4h_to_h")


def _expert_bytes(hidden: int, inner: int, element_size: int) -> int:
    """Return the bytes that live at once for one token in one expert, as transformers groups tokens by expert.

    Its hidden state, gate and up in one tensor, the activation and the product; later the projection back, weighted and
    in the old order; six whole numbers of 8 bytes for sorting throughout.
    """
    return max(hidden + 4 * inner, 4 * hidden) * element_size + 6 * 8


def _weights(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0
