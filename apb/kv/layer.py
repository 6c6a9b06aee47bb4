"""Tensors of one layer: cached keys and values, and raw projections.

Shapes: B batch (1), S tokens, T cached tokens, H query heads, K kv heads, D head dim, E projection width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LayerKV:
    """Keys (rotated) and values of one layer."""

    k_BKTD: Tensor
    v_BKTD: Tensor


@dataclass(frozen=True)
class Projections:
    """The raw outputs of the q, k and v projections, before RoPE, of a block's tokens."""

    q_BSE: Tensor  # (B, S, H*D)
    k_BSE: Tensor  # (B, S, K*D)
    v_BSE: Tensor  # (B, S, K*D)
