"""The contract of a linear recurrence: one call's inputs, and what can be computed of them.

Over any stretch of tokens the state is an affine function of the state before: S_out = M S_in + U. So hosts run their
stretches from zero, exchange (M, U), and correct their outputs by the state that the stretches before them left.

Shapes: B batch (1), S tokens, H value heads, K key dim, V value dim (states are (B, H, K, V), in Mamba2 (B, H, V, K)).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from apb.layers.sharding import cut

CHUNK = 64  # tokens of a chunk in the scan written out here
# Tokens that go through a model's function at once: what all chunks of a call make in fp32 is what takes memory.
PIECE = 4096
KDA_PIECE = 512  # transformers' own makes 3 numbers for each pair of a chunk's tokens, head and key channel


@dataclass(frozen=True)
class Affine:
    """A stretch's map of states, S_out = m S_in + u, in fp32 (fp64 for fp64 models)."""

    m: Tensor | None  # (B, H, K, K), or (B, H, 1, 1) for a number a head; None: nothing comes before the stretch
    u: Tensor  # a state

    def apply(self, state: Tensor | None) -> Tensor:
        """Return the state after the stretch; ``state`` None: zero."""
        if state is None:
            return self.u
        assert self.m is not None
        return _through(self.m, state) + self.u

    def then(self, later: Affine) -> Affine:
        """Return the map of this stretch and the one behind it."""
        assert later.m is not None
        m = None if self.m is None else _through(later.m, self.m)
        return Affine(m, _through(later.m, self.u) + later.u)

    @property
    def packed_X(self) -> Tensor:
        """Both as one row of numbers, to be sent; ``m`` comes first."""
        parts = [self.u] if self.m is None else [self.m, self.u]
        return torch.cat([x.reshape(-1) for x in parts])

    @classmethod
    def unpacked(cls, packed_X: Tensor, m: Sequence[int] | None, u: Sequence[int]) -> Affine:
        """Return what was packed from tensors of these shapes, without copying."""
        size = 0 if m is None else torch.Size(m).numel()
        return cls(None if m is None else packed_X[:size].view(tuple(m)), packed_X[size:].view(tuple(u)))


def _through(m: Tensor, x: Tensor) -> Tensor:
    return m * x if m.shape[-2:] == (1, 1) else m @ x


class Pending(ABC):
    """Changes of the state by a tree's rows; no row has a state of its own."""

    @abstractmethod
    def commit(self, rows_P: Tensor, state: Tensor) -> Tensor:
        """Return the state after a path from the root: its rows, ascending, at least one."""


@dataclass(frozen=True)
class Mapped:
    """A stretch that was run from zero: its map, and its outputs as a function of the state before it."""

    affine: Affine
    out_BSHV: Tensor  # from zero
    reach_BSHK: Tensor  # out = out from zero + reach S_in
    turned: bool = False  # whether states are (V, K)

    def corrected(self, state: Tensor) -> Tensor:
        """Return the outputs (B, S, H, V) behind ``state``."""
        out_BSHV = torch.empty_like(self.out_BSHV, memory_format=torch.contiguous_format)
        state_BHKV = state.mT if self.turned else state
        for start, stop in cut(out_BSHV.shape[1], PIECE):
            added_BHSV = self.reach_BSHK[:, start:stop].to(state.dtype).transpose(1, 2) @ state_BHKV
            out_BSHV[:, start:stop] = self.out_BSHV[:, start:stop] + added_BHSV.transpose(1, 2)
        return out_BSHV


@dataclass(frozen=True)
class Scan(ABC):
    """The inputs of one call of a recurrence."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of the call."""

    @property
    @abstractmethod
    def state_dtype(self) -> torch.dtype:
        """The type of states: fp32, or fp64 for fp64 models."""

    @property
    @abstractmethod
    def by_token(self) -> tuple[Tensor, ...]:
        """Tensors that are given by token, each (B, S, ...)."""

    @abstractmethod
    def blank(self) -> Tensor:
        """Return an uninitialised output (B, S, H, V)."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Self:
        """Return the call of tokens [start, stop) alone."""

    @abstractmethod
    def run(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run from a state (None: zero); return the outputs (B, S, H, V) and the state after them."""

    @abstractmethod
    def mapped(self) -> Mapped:
        """Run from zero and return the stretch's map with its outputs."""

    @abstractmethod
    def map_on(self, before: Affine | None) -> Affine:
        """Return the map of ``before`` and these tokens; None: of these alone."""

    @abstractmethod
    def tree(self, state: Tensor, seen_SS: Tensor) -> tuple[Tensor, Pending]:
        """Run rows of a tree over ``state``: return the outputs (B, S, H, V) and what may be committed.

        ``seen_SS`` (bool): a row's ancestors and itself. Parents stand before their children.
        """


def wide_type(x: Tensor) -> torch.dtype:
    """Return the type in which states of such inputs are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
