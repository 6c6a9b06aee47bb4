"""Retaining heads: one small network a layer that says how much later tokens will want a token.

Shapes: B batch, S tokens, E width of q, k and v side by side, W hidden width, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.layers.rows import Projections
from apb.plan.shapes import ModelShape
from burst.errors import UserError


@dataclass(frozen=True, eq=False)
class Head:
    """One layer's head: ``fc2(silu(fc1(x) + bias))``; without ``fc2`` it is linear.

    Source: Locret (arXiv 2410.01805), section 3.1; the bias, absent in published heads, is ours.
    """

    fc1_WE: Tensor  # (W, E); (K, E) when linear
    bias_W: Tensor | None = None
    fc2_KW: Tensor | None = None

    def __call__(self, x_BSE: Tensor) -> Tensor:
        """Return scores (B, S, K) in the type of the weights; leading dimensions may be any."""
        hidden_BSW = F.linear(x_BSE.to(self.fc1_WE.dtype), self.fc1_WE, self.bias_W)
        return hidden_BSW if self.fc2_KW is None else F.linear(F.silu(hidden_BSW), self.fc2_KW)

    @property
    def hidden(self) -> int:
        """The hidden width; 0 when linear."""
        return 0 if self.fc2_KW is None else self.fc1_WE.shape[0]

    @property
    def kv_heads(self) -> int:
        """Scores a token."""
        return (self.fc1_WE if self.fc2_KW is None else self.fc2_KW).shape[0]

    def to(self, target: torch.device | torch.dtype) -> Head:
        """Return the head on a device or in a type."""
        fc1_WE, bias_W, fc2_KW = (
            None if part is None else part.to(target) for part in (self.fc1_WE, self.bias_W, self.fc2_KW)
        )
        assert fc1_WE is not None
        return Head(fc1_WE, bias_W, fc2_KW)

    def absorbing(self, mean_E: Tensor, deviation_E: Tensor) -> Head:
        """Return the head that does to x what this one does to ``(x - mean) / deviation``."""
        fc1_WE = self.fc1_WE / deviation_E
        shift_W = -(fc1_WE @ mean_E)
        bias_W = shift_W if self.bias_W is None else self.bias_W + shift_W
        return Head(fc1_WE, bias_W, self.fc2_KW)


Keys = Literal["raw", "from_end"]


@dataclass(frozen=True, eq=False)
class RetainingHeads:
    """One head a layer, and what is known of where they come from (``about``)."""

    layers: tuple[Head, ...]
    window: int  # neighbouring tokens that a score spreads over, by max-pool; 1: none
    keys: Keys  # what a head sees of the keys: before their rotation, as published, or as the context's end meets them
    about: Mapping[str, str]

    def check(self, shape: ModelShape) -> None:
        """Raise UserError unless the heads fit a model of ``shape``."""
        first = self.layers[0]
        found = (len(self.layers), first.fc1_WE.shape[1], first.kv_heads)
        h = shape.heads
        wanted = (len(shape.mixers), (h.q_heads + 2 * h.kv_heads) * h.qk_dim, h.kv_heads)
        if found != wanted:
            words = "{} layers, inputs of {}, {} kv heads"
            raise UserError(
                "these retaining heads belong to another model",
                given=words.format(*found),
                allowed=words.format(*wanted),
                remedy="Train heads for this model (apb train retaining_heads model=...) and set compress.heads.",
            )


def head_input(seen: Projections, keys_from_end_BKSD: Tensor | None) -> Tensor:
    """Return what a head reads (B, S, E): q, k and v side by side, q and v before rotation.

    ``keys_from_end_BKSD`` stands in for the raw keys. How much a token is attended to depends on how far away it is,
    which raw keys do not say.
    """
    k_BSE = seen.k_BSP if keys_from_end_BKSD is None else keys_from_end_BKSD.transpose(1, 2).flatten(2)
    return torch.cat([seen.q_BSP, k_BSE, seen.v_BSP], dim=-1)
