"""The exchange of stretches' maps: every host learns the states before its stretches, and the state at the end.

``gather``: one round, every map goes to every host, and all compose them alike. ``doubling``: rounds of a scan in which
a map goes 1, 2, 4, ... stretches on; a host holds two maps a stretch at most. Moves are data, so bytes are counted from
them. Source: Hillis and Steele's scan; a gather of maps is what flash-linear-attention's context parallelism does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from apb.layers.recurrences.base import Affine
from burst.transport import Message, Transport


@dataclass(frozen=True)
class Move:
    """A stretch's map so far goes to a host. ``whole``: with M, which a map that begins the sequence does not need."""

    stretch: int
    src: int
    dst: int
    whole: bool


@dataclass(frozen=True)
class Sizes:
    """Shapes of M and of a state."""

    m: tuple[int, ...]
    u: tuple[int, ...]

    def numbers(self, whole: bool) -> int:
        """Numbers of one map in a message."""
        return torch.Size(self.u).numel() + (torch.Size(self.m).numel() if whole else 0)


Rounds = tuple[tuple[Move, ...], ...]


@lru_cache(maxsize=1024)
def moves(way: str, owners: tuple[int, ...], hosts: int, kept: bool, rank: int) -> Rounds:
    """Return the moves from and to a host, round by round.

    ``owners``: the hosts of all stretches in position order; ``kept``: all hosts need the state at the end.
    """
    if way == "gather":
        return (tuple(_gathered(owners, hosts, kept, rank)),)
    out, step, count = [], 1, len(owners)
    last = count if kept else count - 1  # nobody needs what the last stretch of an anchor leaves
    while step < last:
        out.append([Move(i, owners[i], owners[i + step], i >= step) for i in range(last - step)])
        step *= 2
    out.append([Move(i, owners[i], owners[i + 1], False) for i in range(count - 1)])
    if kept:
        out[-1] += [Move(count - 1, owners[-1], host, False) for host in range(hosts)]
    return tuple(tuple(m for m in each if m.src != m.dst and rank in (m.src, m.dst)) for each in out)


def _gathered(owners: Sequence[int], hosts: int, kept: bool, rank: int) -> list[Move]:
    final = {owner: i for i, owner in enumerate(owners)}
    needed = [len(owners) if kept else final.get(host, 0) for host in range(hosts)]
    out = [Move(i, rank, dst, i > 0) for i in range(len(owners)) if owners[i] == rank for dst in range(hosts)]
    into = [Move(i, owners[i], rank, i > 0) for i in range(len(owners)) if owners[i] != rank]
    return [move for move in (*out, *into) if move.src != move.dst and move.stretch < needed[move.dst]]


def states(
    way: str,
    own: Mapping[int, Affine],
    owners: tuple[int, ...],
    kept: bool,
    transport: Transport,
    sizes: Sizes,
    step: str,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Return the states before this host's stretches (none before the first) and, if ``kept``, that at the end.

    ``own``: the maps of this host's stretches by their numbers. Every host of the sequence calls this.
    """
    like = next(iter(own.values())).u if own else None
    rounds = moves(way, owners, transport.world, kept, transport.rank)
    if way == "gather":
        return _composed({**own, **_moved(rounds[0], own, transport, sizes, like, step)}, own, len(owners), kept)
    held, stride = dict(own), 1
    for number, each in enumerate(rounds[:-1]):
        arrived = _moved(each, held, transport, sizes, like, f"{step} {number}")
        known = {**held, **arrived}
        held |= {i: known[i - stride].then(affine) for i, affine in held.items() if i - stride in known and i >= stride}
        stride *= 2
    known = {**held, **_moved(rounds[-1], held, transport, sizes, like, f"{step} {len(rounds) - 1}")}
    before = {i: known[i - 1].u for i in own if i}
    return before, known[len(owners) - 1].u if kept else None


def _composed(
    known: Mapping[int, Affine], own: Mapping[int, Affine], count: int, kept: bool
) -> tuple[dict[int, Tensor], Tensor | None]:
    before: dict[int, Tensor] = {}
    state: Tensor | None = None
    for i in range(count):
        if i in own and state is not None:
            before[i] = state
        if i not in known:
            break
        state = known[i].apply(state)
    return before, state if kept else None


def _moved(
    each: Sequence[Move], held: Mapping[int, Affine], t: Transport, sizes: Sizes, like: Tensor | None, step: str
) -> dict[int, Affine]:
    """Send and receive one round's maps, those for one peer in one message."""
    out, into = defaultdict[int, list[Move]](list), defaultdict[int, list[Move]](list)
    for move in each:
        if move.src == t.rank:
            out[move.dst].append(move)
        else:
            into[move.src].append(move)
    sends = []
    for peer, theirs in out.items():
        maps = [held[m.stretch] if m.whole else Affine(None, held[m.stretch].u) for m in theirs]
        sends.append(Message(peer, torch.cat([affine.packed_X for affine in maps])))
    buffers = {}
    for peer, mine in into.items():
        size = sum(sizes.numbers(m.whole) for m in mine)
        assert like is not None
        buffers[peer] = like.new_empty(size)
    if sends or buffers:
        t.exchange(sends, [Message(p, x) for p, x in buffers.items()], kind="state", step=step).wait()
    arrived: dict[int, Affine] = {}
    for peer, mine in into.items():
        parts = buffers[peer].split([sizes.numbers(m.whole) for m in mine])
        for m, part in zip(mine, parts, strict=True):
            arrived[m.stretch] = Affine.unpacked(part, sizes.m if m.whole else None, sizes.u)
    return arrived
