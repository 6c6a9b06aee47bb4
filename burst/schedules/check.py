"""Prove a schedule right without running it: coverage, buffers, messages and progress.

Messages are compared in the order in which each end posts them. Programs then run on symbols. A post makes
progress only when all earlier posts of its channel are done and its counterparts have started, which is what
NCCL does and stricter than gloo. Nothing depends on a race, so one such run stands for all.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from burst.schedules.base import Schedule
from burst.schedules.steps import Parcel, Post
from burst.schedules.symbolic import Content, Pair, ScheduleError, SymbolicRank

__all__ = ["ScheduleError", "check"]

_PostId = tuple[int, int]  # (rank, name of a post)
_Matches = dict[tuple[int, int, Parcel], tuple[int, int, Parcel]]  # receive -> send, each (rank, post's name, parcel)


def check(schedule: Schedule) -> None:
    """Raise ScheduleError unless each needed pair is computed exactly once and all results end up complete.

    Also proved: a compute reads the block it names; no slot is written while a send from it, or read or
    written while a receive into it, is under way; messages match in order between any two ranks, over all
    channels together; nothing is received that is not used; no deadlock with a communicator a channel, nor
    with one for all.
    """
    links = _match(schedule)
    for one_channel in (False, True):
        _SymbolicRun(schedule, links, one_channel).finish()


def _match(schedule: Schedule) -> _Matches:
    """Pair every receive with its send."""
    sent: defaultdict[tuple[int, int], list[tuple[str, int, Parcel]]] = defaultdict(list)
    received: defaultdict[tuple[int, int], list[tuple[str, int, Parcel]]] = defaultdict(list)
    for rank, program in enumerate(schedule.programs):
        for post in (s for s in program if isinstance(s, Post)):
            for p in post.sends:
                sent[rank, p.peer].append((post.channel, post.name, p))
            for p in post.recvs:
                received[p.peer, rank].append((post.channel, post.name, p))
    links: _Matches = {}
    for src, dst in {*sent, *received}:
        out, into = sent[src, dst], received[src, dst]
        if [_label(m) for m in out] != [_label(m) for m in into]:
            given, expected = ([_label(m) for m in side] for side in (out, into))
            raise ScheduleError(f"rank {src} sends {given}, but rank {dst} expects {expected}")
        for (_, a, send), (_, b, recv) in zip(out, into, strict=True):
            links[dst, b, recv] = (src, a, send)
    return links


def _label(message: tuple[str, int, Parcel]) -> tuple[str, str, int, int | None]:
    channel, _, parcel = message
    return channel, parcel.slot.role, parcel.block, parcel.heads


class _SymbolicRun:
    """All ranks together; ``one_channel`` puts all posts of a rank into one queue."""

    def __init__(self, schedule: Schedule, links: _Matches, one_channel: bool) -> None:
        self.links = links
        computed: Counter[tuple[int, Pair]] = Counter()
        self.ranks = [SymbolicRank(schedule, r, computed) for r in range(schedule.world)]
        self.peers: defaultdict[_PostId, set[_PostId]] = defaultdict(set)
        for (dst, b, _), (src, a, _) in links.items():
            self.peers[dst, b].add((src, a))
            self.peers[src, a].add((dst, b))
        self.before: dict[_PostId, _PostId | None] = {}  # the post before it in its queue
        for r, rank in enumerate(self.ranks):
            last: dict[str, _PostId] = {}
            for post in (s for s in rank.program if isinstance(s, Post)):
                channel = "" if one_channel else post.channel
                self.before[r, post.name] = last.get(channel)
                last[channel] = (r, post.name)
        self.done: set[_PostId] = set()

    def finish(self) -> None:
        """Run all programs to their ends."""
        moved = True
        while moved:
            moved = self._settle()
            for r, rank in enumerate(self.ranks):
                while rank.at < len(rank.program):
                    name = rank.waits_for()
                    if name is not None and (r, name) not in self.done:
                        break
                    rank.run_step({} if name is None else self._arriving(r, name))
                    moved = True
        stuck = [r for r, rank in enumerate(self.ranks) if rank.at < len(rank.program)]
        if stuck:
            raise ScheduleError(f"deadlock: ranks {stuck} wait, rank {stuck[0]} at {self.ranks[stuck[0]].where}")
        for rank in self.ranks:
            rank.check_end()

    def _arriving(self, r: int, name: int) -> dict[tuple[int, Parcel], Content]:
        out = {}
        for p in self.ranks[r].posted[name].recvs:
            src, post, parcel = self.links[r, name, p]
            out[name, p] = self.ranks[src].sent[post, parcel]
        return out

    def _started(self, post: _PostId) -> bool:
        before = self.before[post]
        return post[1] in self.ranks[post[0]].posted and (before is None or before in self.done)

    def _settle(self) -> bool:
        """Complete every post that can; return whether any did."""
        ready = [
            (r, name)
            for r, rank in enumerate(self.ranks)
            for name in rank.posted
            if (r, name) not in self.done
            and self._started((r, name))
            and all(self._started(peer) for peer in self.peers[r, name])
        ]
        self.done.update(ready)
        return bool(ready)
