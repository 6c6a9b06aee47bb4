"""Calls of linear layers, and what every host keeps of one: state and the convolution's last inputs.

Shapes: B batch (1), S tokens, C channels, R reach (kernel - 1), H value heads, V value dim, M rows of a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from apb.layers.base import LayerCache, Step
from apb.layers.call import Call
from apb.layers.recurrences.base import Pending, Scan
from apb.layers.recurrences.convolution import Convolve, behind, columns, over_tree, tail

_SHORT = 16  # new tokens up to which the closed form is less work than a function that fills up chunks


@dataclass
class ConvCall(Call):
    """The causal convolution of a linear layer; the output is (B, C, S). ``convolve``: the model's own, from zeros."""

    ends: ClassVar[bool] = False

    layer: int
    x_BCS: Tensor
    convolve: Convolve

    @property
    def tokens(self) -> int:
        return self.x_BCS.shape[2]

    def rows(self, start: int, stop: int) -> ConvCall:
        return dataclasses.replace(self, x_BCS=self.x_BCS[:, :, start:stop])

    def join(self, outs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(outs), dim=2)

    def share(self, out: Tensor, start: int, stop: int) -> Tensor:
        return out[:, :, start:stop]

    def given(self) -> list[Tensor]:
        return [self.x_BCS[0].T]

    def blank(self) -> Tensor:
        return torch.empty_like(self.x_BCS)


@dataclass
class ScanCall(Call):
    """The recurrence of a linear layer; the output is (B, S, H, V)."""

    layer: int
    scan: Scan

    @property
    def tokens(self) -> int:
        return self.scan.tokens

    def rows(self, start: int, stop: int) -> ScanCall:
        return dataclasses.replace(self, scan=self.scan.rows(start, stop))

    def join(self, outs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(outs), dim=1)

    def share(self, out: Tensor, start: int, stop: int) -> Tensor:
        return out[:, start:stop]

    def given(self) -> list[Tensor]:
        return [x[0].flatten(1) for x in self.scan.by_token]

    def blank(self) -> Tensor:
        return self.scan.blank()


class LinearCache:
    """The state and the convolution's last inputs, at the end of the context and behind the last token.

    No tensor here is ever written to, so copies share them. A tree's rows are pending until a path is kept.
    """

    def __init__(self, kernel: int) -> None:
        self._kernel = kernel
        self._state: Tensor | None = None
        self._tail_BCR: Tensor | None = None
        self._snapshot: tuple[Tensor | None, Tensor | None] = (None, None)  # at the end of the context
        self._columns_BCM: Tensor | None = None  # a tree's inputs of the convolution
        self._pending: Pending | None = None

    def fill_tail(self, tail_BCR: Tensor) -> None:
        """Keep the convolution's last inputs of the context."""
        self._tail_BCR = self.filled(tail_BCR)
        self._snapshot = self._snapshot[0], self._tail_BCR

    def filled(self, columns_BCX: Tensor) -> Tensor:
        """Return a copy of at most R columns, behind zeros for those that stand before the sequence's start."""
        missing = self._kernel - 1 - columns_BCX.shape[2]
        return torch.nn.functional.pad(columns_BCX, (missing, 0)) if missing else columns_BCX.clone()

    def fill_state(self, state: Tensor) -> None:
        """Keep the state at the end of the context."""
        self._state = state.clone()
        self._snapshot = self._state, self._snapshot[1]

    def attend(self, call: Call, step: Step) -> Tensor:
        """Run new tokens' convolution (B, C, S), then their recurrence (B, S, H, V)."""
        if isinstance(call, ConvCall):
            return self._convolve(call, step)
        assert isinstance(call, ScanCall)
        return self._scan(call, step)

    def _convolve(self, call: ConvCall, step: Step) -> Tensor:
        assert self._tail_BCR is not None and self._columns_BCM is None
        if step.parents is not None:
            self._columns_BCM = call.x_BCS.clone()
            index_MW = _index(step.parents, self._kernel, call.x_BCS.device)
            return over_tree(self._tail_BCR, call.x_BCS, index_MW, call.convolve)
        out_BCS = behind(self._tail_BCR, call.x_BCS, call.convolve)
        self._tail_BCR = tail(self._tail_BCR, call.x_BCS)
        return out_BCS

    def _scan(self, call: ScanCall, step: Step) -> Tensor:
        assert self._state is not None and self._pending is None
        if step.parents is not None:
            out_BSHV, self._pending = call.scan.tree(self._state, step.seen_MM)
        elif call.tokens <= _SHORT:
            rows_S = torch.arange(call.tokens, device=self._state.device)
            out_BSHV, pending = call.scan.tree(self._state, rows_S[:, None] >= rows_S)
            self._state = pending.commit(rows_S, self._state)
        else:
            out_BSHV, self._state = call.scan.run(self._state)
        return out_BSHV

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only the tree's rows of one path from its root."""
        if self._pending is None:
            return
        assert self._state is not None and self._tail_BCR is not None and self._columns_BCM is not None
        if rows:
            index_P = _rows(tuple(rows), self._state.device)
            self._state = self._pending.commit(index_P, self._state)
            self._tail_BCR = tail(self._tail_BCR, self._columns_BCM.index_select(2, index_P))
        self._pending = self._columns_BCM = None

    def restart(self) -> None:
        """Go back to the end of the context."""
        self._state, self._tail_BCR = self._snapshot
        self._pending = self._columns_BCM = None

    def fork(self, reads: LayerCache | None = None) -> LinearCache:
        """Return a copy that goes on independently."""
        out = LinearCache(self._kernel)
        out.__dict__ |= self.__dict__
        return out


@lru_cache(maxsize=16)
def _rows(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Return kept rows, which all layers share."""
    return torch.tensor(rows, device=device)


@lru_cache(maxsize=16)
def _index(parents: tuple[int, ...], kernel: int, device: torch.device) -> Tensor:
    """Return ``columns`` of a tree, which all layers of a step share."""
    return torch.tensor(columns(parents, kernel), device=device)
