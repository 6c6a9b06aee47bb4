"""Layers with latents (MLA) in transformers' models: they are found, and hand over latents instead of keys and values.

``expand_kv`` of such a module makes keys and values of the latents just before attention. Where it is ours, it returns
what it is given: attention gets the latents as keys and their rotated parts as values of one head, and nobody makes
keys and values of a whole block. The class's own is untouched.

Shapes: B batch (1), S tokens, H query heads, D head dim, R width of a latent, P of its rotated part, E value dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from apb.layers.expansion import Expansion
from apb.layers.latent import Latent
from burst.errors import UserError


def has_latents(module: nn.Module) -> bool:
    """Return True for attention that makes its keys and values of latents in a step of its own."""
    return hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv")


def latent_kind(module: nn.Module) -> Latent:
    """Return the sizes of such a module. ``config.head_dim`` is another one in every family, and is not read.

    Raises UserError where an indexer chooses which latents are attended to.
    """
    m: Any = module
    if hasattr(module, "indexer"):
        raise UserError(
            f"{type(module).__name__} attends to what a sparse indexer chooses, not to all tokens",
            given=f"a model with {type(module).__name__}",
            allowed="latent attention over all tokens, as in DeepSeek-V2 and V3, GLM-4.7-Flash, Mistral 4 and MiniCPM3",
            remedy="Choose a model of docs/models.md.",
        )
    return Latent(m.num_heads, m.qk_nope_head_dim, m.qk_rope_head_dim, m.kv_lora_rank, m.v_head_dim)


def keep_latents(module: nn.Module) -> None:
    """Let a module hand its latents to attention as they are; raises UserError for a matrix with a bias."""
    m: Any = module
    if m.kv_b_proj.bias is not None:
        raise UserError(
            "the matrix that makes keys and values of latents has a bias",
            given=f"{type(module).__name__}.kv_b_proj.bias",
            allowed="a matrix without a bias",
            remedy="Choose another model.",
        )
    m.expand_kv = _as_it_is


def expansion(module: nn.Module) -> Expansion:
    """Return a module's matrix, as it is now."""
    m: Any = module
    kind = latent_kind(module)
    weight: Tensor = m.kv_b_proj.weight
    return Expansion(weight.view(kind.q_heads, kind.nope + kind.v_dim, kind.kv_lora), kind.nope)


def own_expansion(module: nn.Module, latent_B1SR: Tensor, rotated_B1SP: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys (B, H, S, D) and values (B, H, S, E) that the module's class makes of latents."""
    own: Any = type(module)
    keys, values = own.expand_kv(module, latent_B1SR, rotated_B1SP)
    return keys, values


def _as_it_is(latent_B1SR: Tensor, rotated_B1SP: Tensor) -> tuple[Tensor, Tensor]:
    return latent_B1SR, rotated_B1SP
