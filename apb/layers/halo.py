"""Halos: positions before a host's stretches, and at a sequence's end, whose rows it gets straight from their owners.

Stretches may be shorter than a halo, which then has several owners.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from apb.layers.sharding import Interval, Sharding, common, union, without
from burst.transport import Message, Transport

# By host: the peers that it sends to, and the positions sent to each.
Traffic = tuple[tuple[tuple[int, tuple[Interval, ...]], ...], ...]
Found = list[tuple[Interval, Tensor]]  # rows of neighbouring positions


@dataclass(frozen=True)
class Reach:
    """The first position that a token needs: of its last ``window``, its own included, or of its own chunk."""

    window: int
    chunked: bool = False

    def __call__(self, position: int) -> int:
        if self.chunked:
            return position // self.window * self.window
        return max(0, position - self.window + 1)


def needed(reach: Reach, sharding: Sharding, rank: int, kept: bool) -> list[Interval]:
    """Return the positions that a host needs beside its stretches: before them, and (``kept``) at the end."""
    n = sharding.length
    halos = [(reach(start), start) for start, stop in sharding.spans[rank] if start < stop]
    return [*halos, *([(reach(n), n)] if kept else [])]


@lru_cache(maxsize=256)
def traffic(reach: Reach, sharding: Sharding, kept: bool) -> Traffic:
    """Return what every host sends."""
    out: list[dict[int, list[Interval]]] = [{} for _ in sharding.spans]
    for receiver in range(sharding.hosts):
        wanted = without(needed(reach, sharding, receiver, kept), list(sharding.spans[receiver]))
        low, high = (wanted[0][0], wanted[-1][1]) if wanted else (0, 0)
        for start, stop, owner in sharding.stretches:
            if start < high and stop > low and owner != receiver:
                parts = common([(start, stop)], wanted)
                out[owner].setdefault(receiver, []).extend(parts)
    return tuple(tuple((peer, tuple(union(parts))) for peer, parts in each.items() if parts) for each in out)


def exchanged(sends: Traffic, own: Found, like: Tensor, dim: int, transport: Transport, kind: str, step: str) -> Found:
    """Send rows that this host has and return those that arrive, along ``dim``; other sizes are those of ``like``."""
    t = transport
    arriving = [(src, parts) for src, each in enumerate(sends) for peer, parts in each if peer == t.rank]
    buffers = []
    for _, parts in arriving:
        size = list(like.shape)
        size[dim] = sum(stop - start for start, stop in parts)
        buffers.append(like.new_empty(size))
    out = [Message(peer, torch.cat([picked(own, p, dim) for p in parts], dim=dim)) for peer, parts in sends[t.rank]]
    if out or buffers:
        recvs = [Message(src, buffer) for (src, _), buffer in zip(arriving, buffers, strict=True)]
        t.exchange(out, recvs, kind=kind, step=step).wait()
    found: Found = []
    for (_, parts), buffer in zip(arriving, buffers, strict=True):
        found += zip(parts, buffer.split([stop - start for start, stop in parts], dim=dim), strict=True)
    return found


def picked(found: Found, interval: Interval, dim: int) -> Tensor:
    """Return the rows at the positions of ``interval``, in order; all of them must be there."""
    parts: list[tuple[int, Tensor]] = []
    for (start, stop), rows in found:
        low, high = max(start, interval[0]), min(stop, interval[1])
        if low < high:
            parts.append((low, rows.narrow(dim, low - start, high - low)))
    parts.sort(key=lambda each: each[0])
    out = torch.cat([part for _, part in parts], dim=dim) if parts else found[0][1].narrow(dim, 0, 0)
    assert out.shape[dim] == interval[1] - interval[0], (interval, out.shape)
    return out
