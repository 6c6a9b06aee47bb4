"""Calls: what the layers of a model ask of whatever stands in for their attention, or their recurrence.

Shapes: B batch (1), S tokens, H query heads, K kv heads, D head dim, E value dim, C channels.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apb.layers.expansion import Expansion
from apb.layers.rows import Projections


class Call(ABC):
    """One request of one mixer. ``layer``: its number in the model's order of mixers.

    What it holds is the callee's own until that returns: the output may be written over the queries, and what is kept
    is copied.
    """

    layer: int
    ends: ClassVar[bool] = True  # whether the mixer asks for nothing more

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that the call is about."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Call:
        """Return the call of the tokens [start, stop)."""

    @abstractmethod
    def join(self, outs: Sequence[Tensor]) -> Tensor:
        """Put the outputs of neighbouring tokens together."""

    @abstractmethod
    def share(self, out: Tensor, start: int, stop: int) -> Tensor:
        """Return the tokens [start, stop) of an output, without copying."""

    @abstractmethod
    def given(self) -> list[Tensor]:
        """Return what the call is about by token, each (S, X)."""

    @abstractmethod
    def blank(self) -> Tensor:
        """Return an uninitialised output."""


@dataclass
class AttentionCall(Call):
    """Attention of new tokens, queries and keys rotated; the output is (B, S, H, E). ``sinks_H``: logits of sinks.

    ``latent``: in layers with latents, which are then the keys, and their rotated parts the values, of one head: the
    matrix that makes keys and values of them.
    """

    layer: int
    q_BHSD: Tensor
    k_BKSD: Tensor
    v_BKSE: Tensor
    scale: float
    sinks_H: Tensor | None = None
    projections: Projections | None = None
    latent: Expansion | None = None

    @property
    def tokens(self) -> int:
        return self.q_BHSD.shape[2]

    @property
    def value_dim(self) -> int:
        """E."""
        return self.v_BKSE.shape[3] if self.latent is None else self.latent.value_dim

    def rows(self, start: int, stop: int) -> AttentionCall:
        q, k, v = (x[:, :, start:stop] for x in (self.q_BHSD, self.k_BKSD, self.v_BKSE))
        raw = None if self.projections is None else self.projections.rows(start, stop)
        return dataclasses.replace(self, q_BHSD=q, k_BKSD=k, v_BKSE=v, projections=raw)

    def join(self, outs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(outs), dim=1)

    def share(self, out: Tensor, start: int, stop: int) -> Tensor:
        return out[:, start:stop]

    def given(self) -> list[Tensor]:
        return [x[0].transpose(0, 1).flatten(1) for x in (self.q_BHSD, self.k_BKSD, self.v_BKSE)]

    def blank(self) -> Tensor:
        batch, heads, tokens, _ = self.q_BHSD.shape
        return self.q_BHSD.new_empty(batch, tokens, heads, self.value_dim)


def plain(call: Call) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return queries, keys, values and scale of attention that asks for nothing else."""
    assert isinstance(call, AttentionCall) and call.sinks_H is None
    given = call.k_BKSD, call.v_BKSE
    k_BKSD, v_BKSE = given if call.latent is None else call.latent.expand(*given)
    return call.q_BHSD, k_BKSD, v_BKSE, call.scale
