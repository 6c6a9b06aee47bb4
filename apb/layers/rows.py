"""Tensors of one layer: keys and values, rows that grow, and raw projections.

Shapes: B batch (1), S new tokens, T cached tokens, H query heads, K kv heads, D head dim, E value dim, P width of a
projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerKV:
    """Keys (rotated) and values of one layer."""

    k_BKTD: Tensor
    v_BKTE: Tensor

    def __len__(self) -> int:
        return self.k_BKTD.shape[2]

    def rows(self, start: int, stop: int) -> LayerKV:
        """Return the rows [start, stop) without copying."""
        return LayerKV(self.k_BKTD[:, :, start:stop], self.v_BKTE[:, :, start:stop])

    def clone(self) -> LayerKV:
        """Return an independent copy."""
        return LayerKV(self.k_BKTD.clone(), self.v_BKTE.clone())


@dataclass(frozen=True)
class Projections:
    """The raw outputs of the q, k and v projections, before RoPE, of a block's tokens."""

    q_BSP: Tensor  # (B, S, H*D)
    k_BSP: Tensor  # (B, S, K*D)
    v_BSP: Tensor  # (B, S, K*E)

    def rows(self, start: int, stop: int) -> Projections:
        """Return the tokens [start, stop) without copying."""
        return Projections(*(x[:, start:stop] for x in (self.q_BSP, self.k_BSP, self.v_BSP)))


class Rows:
    """The keys and values of tokens that came after the context, in buffers that grow by doubling."""

    def __init__(self) -> None:
        self._kv: LayerKV | None = None
        self._count = 0
        self._last = 0  # tokens that were added last, and that ``keep`` chooses among

    def __len__(self) -> int:
        return self._count

    def view(self) -> LayerKV | None:
        """Return what is held without copying; None when there is nothing."""
        return None if self._kv is None or not self._count else self._kv.rows(0, self._count)

    def append(self, k_BKSD: Tensor, v_BKSE: Tensor) -> None:
        """Add new tokens' keys and values."""
        n, new = self._count, k_BKSD.shape[2]
        if self._kv is None or n + new > len(self._kv):
            self._kv = _grown(self._kv, n, max(64, 2 * n, n + new), k_BKSD, v_BKSE)
        self._kv.k_BKTD[:, :, n : n + new] = k_BKSD
        self._kv.v_BKTE[:, :, n : n + new] = v_BKSE
        self._count, self._last = n + new, new

    def truncate(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""
        self._count, self._last = min(self._count, length), 0

    def keep(self, rows: Sequence[int]) -> None:
        """Forget of the tokens added last all but ``rows``, ascending, counted from the first of them."""
        if not self._last:
            return
        length = self._count - self._last
        if list(rows) != list(range(len(rows))):
            assert self._kv is not None
            index = torch.tensor(rows, device=self._kv.k_BKTD.device) + length
            for x in (self._kv.k_BKTD, self._kv.v_BKTE):  # index_select copies before rows are overwritten
                x[:, :, length : length + len(rows)] = x.index_select(2, index)
        self.truncate(length + len(rows))

    def copy(self) -> Rows:
        """Return an independent copy."""
        out, kv = Rows(), self.view()
        if kv is not None:
            out.append(kv.k_BKTD, kv.v_BKTE)
            out._last = 0
        return out


def _grown(old: LayerKV | None, used: int, capacity: int, k_BKSD: Tensor, v_BKSE: Tensor) -> LayerKV:
    new = LayerKV(*(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (k_BKSD, v_BKSE)))
    if old is not None:
        new.k_BKTD[:, :, :used] = old.k_BKTD[:, :, :used]
        new.v_BKTE[:, :, :used] = old.v_BKTE[:, :, :used]
    return new


def side_by_side(parts: Sequence[LayerKV]) -> LayerKV:
    """Return the rows of all parts in order; of one part itself."""
    if len(parts) == 1:
        return parts[0]
    return LayerKV(torch.cat([p.k_BKTD for p in parts], dim=2), torch.cat([p.v_BKTE for p in parts], dim=2))


def picked(here: Sequence[tuple[LayerKV, Sequence[tuple[int, int]]]], wanted: tuple[int, int]) -> LayerKV:
    """Return the rows at the positions [start, stop) of ``wanted``, in order, of rows at given positions.

    All of them must be there.
    """
    found: list[tuple[int, LayerKV]] = []
    for keys, at in here:
        row = 0
        for start, stop in at:
            low, high = max(start, wanted[0]), min(stop, wanted[1])
            if low < high:
                found.append((low, keys.rows(row + low - start, row + high - start)))
            row += stop - start
    out = side_by_side([kv for _, kv in sorted(found, key=lambda each: each[0])] or [here[0][0].rows(0, 0)])
    assert len(out) == wanted[1] - wanted[0], (wanted, len(out))
    return out
