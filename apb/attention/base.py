"""The contract of everything that stands in for a model's attention.

Shapes: B batch (1), S tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from apb.kv.layer import Projections


class Attention(Protocol):
    """A stand-in for a model's attention, called once per layer with rotated queries and keys.

    What it is given is its own until it returns: it may write its output over the queries, and what it keeps it copies.
    """

    needs_projections: bool

    def __call__(
        self,
        layer: int,
        q_BHSD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        scale: float,
        projections: Projections | None,
    ) -> Tensor:
        """Return the attention output (B, S, H, D)."""
        ...
