"""Halos: positions before a host's stretches, and at a sequence's end, whose rows it gets straight from their owners.

Stretches may be shorter than a halo, which then has several owners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from apb.layers.sharding import Interval, Sharding, common, union, without
from burst.transport import Message, Transport

Reach = Callable[[int], int]  # the first position that the token at a position needs
# By host: the peers that it sends to, and the positions sent to each.
Traffic = tuple[tuple[tuple[int, tuple[Interval, ...]], ...], ...]


def wanted(reach: Reach, sharding: Sharding, rank: int, kept: bool) -> list[Interval]:
    """Return the positions that a host needs of others: before its stretches, and (``kept``) at the sequence's end."""
    held, n = list(sharding.spans[rank]), sharding.length
    halos = [(reach(start), start) for start, stop in held if start < stop]
    return without([*halos, *([(reach(n), n)] if kept else [])], held)


@lru_cache(maxsize=256)
def traffic(reach: Reach, sharding: Sharding, kept: bool) -> Traffic:
    """Return what every host sends; ``reach`` is hashable and equal for equal layers."""
    out: list[dict[int, list[Interval]]] = [{} for _ in sharding.spans]
    for receiver in range(sharding.hosts):
        needed = wanted(reach, sharding, receiver, kept)
        low, high = (needed[0][0], needed[-1][1]) if needed else (0, 0)
        for start, stop, owner in sharding.stretches:
            if start < high and stop > low and owner != receiver:
                parts = common([(start, stop)], needed)
                out[owner].setdefault(receiver, []).extend(parts)
    return tuple(tuple((peer, tuple(union(parts))) for peer, parts in each.items() if parts) for each in out)


def sent_rows(sends: Traffic, rank: int) -> int:
    """Return the rows that a host sends, each as often as there are peers for it."""
    return sum(stop - start for _, parts in sends[rank] for start, stop in parts)


def exchanged(
    sends: Traffic, sharding: Sharding, own: Tensor, dim: int, transport: Transport, kind: str, step: str
) -> tuple[Tensor, list[Interval]]:
    """Return this host's rows and, behind them, those that arrive, along ``dim``, with the positions of all."""
    t, held = transport, list(sharding.spans[transport.rank])

    def packed(parts: Sequence[Interval]) -> Tensor:
        rows = [sharding.rows(t.rank, part) for part in parts]
        return torch.cat([own.narrow(dim, start, stop - start) for start, stop in rows], dim=dim)

    arriving = [(src, parts) for src, each in enumerate(sends) for peer, parts in each if peer == t.rank]
    buffers = []
    for _, parts in arriving:
        size = list(own.shape)
        size[dim] = sum(stop - start for start, stop in parts)
        buffers.append(own.new_empty(size))
    out = [Message(peer, packed(parts)) for peer, parts in sends[t.rank]]
    if out or buffers:
        recvs = [Message(src, buffer) for (src, _), buffer in zip(arriving, buffers, strict=True)]
        t.exchange(out, recvs, kind=kind, step=step).wait()
    whole = torch.cat([own, *buffers], dim=dim) if buffers else own
    return whole, [*held, *(part for _, parts in arriving for part in parts)]


def picked(rows: Tensor, at: Sequence[Interval], interval: Interval, dim: int) -> Tensor:
    """Return the rows at the positions of ``interval``, in order, of ``rows`` at the positions ``at``."""
    found: list[tuple[int, Tensor]] = []
    row = 0
    for start, stop in at:
        low, high = max(start, interval[0]), min(stop, interval[1])
        if low < high:
            found.append((low, rows.narrow(dim, row + low - start, high - low)))
        row += stop - start
    found.sort(key=lambda each: each[0])
    return torch.cat([part for _, part in found], dim=dim) if found else rows.narrow(dim, 0, 0)
