"""Programs from hops: posts before the work that hides them, waits after it, slots by lifetime."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from burst.schedules.payload import Role
from burst.schedules.routes import Grid, Hop, Needs
from burst.schedules.steps import Compute, Fold, Parcel, Phase, Post, ScheduleStep, Slot, Wait

# Moments within one step, in program order.
POST, WORK, JOIN, RETURN, ARRIVE = range(5)
Moment = tuple[int, int]  # (step, moment within it)


@dataclass(frozen=True)
class Traffic:
    """Messages of a schedule: blocks of role ``block`` along ``hops``, results of role ``result`` along ``returns``.

    ``result`` is None in a pass-KV forward, whose results all stay.
    """

    phase: Phase
    block: Role
    hops: Sequence[Hop]
    result: Role | None = None
    returns: Sequence[Hop] = ()

    @cached_property
    def by_rank(self) -> tuple[dict[int, list[Hop]], dict[int, list[Hop]]]:
        """The hops and returns that each rank sends or receives."""
        return _ends(self.hops), _ends(self.returns)


def _ends(hops: Iterable[Hop]) -> dict[int, list[Hop]]:
    ends: defaultdict[int, list[Hop]] = defaultdict(list)
    for hop in hops:
        ends[hop.src].append(hop)
        ends[hop.dst].append(hop)
    return ends


class _SlotPool:
    """Slots of one role and rank, given out by lifetime: the lowest index that is free again."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._free_after: list[Moment] = []

    def take(self, start: Moment, stop: Moment) -> Slot:
        """Return a slot for the moments ``start`` to ``stop``; calls come in order of ``start``."""
        for i, free_after in enumerate(self._free_after):
            if free_after < start:
                self._free_after[i] = stop
                return Slot(self._role, i + 1)
        self._free_after.append(stop)
        return Slot(self._role, len(self._free_after))


class _PostKey(NamedTuple):
    key: tuple[int, int, str, int]  # post step, moment, channel, due step: one exchange a key
    wait: Moment


def program(rank: int, grid: Grid, needs: Needs, traffic: Traffic) -> tuple[ScheduleStep, ...]:
    """Write the program of one rank; ``routes`` defines its steps."""
    return _Writer(rank, grid, needs, traffic).write()


class _Writer:
    def __init__(self, rank: int, grid: Grid, needs: Needs, traffic: Traffic) -> None:
        self.rank, self.grid, self.needs, self.traffic = rank, grid, needs, traffic
        self.hops, self.returns = (ends.get(rank, []) for ends in traffic.by_rank)
        self.held = self._place_blocks()
        self.results, self.arrivals = self._place_results()

    def _place_blocks(self) -> dict[int, Slot]:
        """Give every block that comes here a slot, from its receive's post to its last use or send."""
        role = self.traffic.block
        held = {self.rank: Slot(role, 0)}
        pool = _SlotPool(role)
        last_send: defaultdict[int, Moment] = defaultdict(lambda: (-1, POST))
        for hop in self.hops:
            if hop.src == self.rank:
                last_send[hop.block] = max(last_send[hop.block], (hop.due - 1, ARRIVE))
        for hop in sorted(h for h in self.hops if h.dst == self.rank):
            held[hop.block] = pool.take((hop.post, POST), max((hop.due, WORK), last_send[hop.block]))
        return held

    def _place_results(self) -> tuple[dict[int, Slot], dict[Hop, Slot]]:
        """Give travelling results slots: computed here (by block) and arriving here (by hop)."""
        role, own = self.traffic.result, self.rank
        if role is None:
            return {}, {}
        leaves = any(h.src == h.block == own for h in self.returns)  # the own contribution goes with the sum
        results, arrivals = ({} if leaves else {own: self._home()}), {}
        wishes: list[tuple[Moment, Moment, int | Hop]] = []
        sent: dict[int, Moment] = {h.block: (h.due, JOIN) for h in self.returns if h.src == own}
        for block in range(self.grid.world):
            if self.needs(own, block) and block not in results:
                wishes.append(((self.grid.step(own, block), WORK), sent[block], block))
        landing = [h for h in self.returns if h.dst == h.block == own]
        for hop in (h for h in self.returns if h.dst == own):
            alone = landing == [hop] and role != "part" and (leaves or not self.needs(own, own))
            if alone:
                arrivals[hop] = self._home()  # nothing to add to: received where it belongs
            else:
                wishes.append(((hop.post, RETURN), (hop.due, JOIN), hop))
        pool = _SlotPool(role)
        for start, stop, what in sorted(wishes, key=lambda w: w[0]):
            if isinstance(what, Hop):
                arrivals[what] = pool.take(start, stop)
            else:
                results[what] = pool.take(start, stop)
        return results, arrivals

    def _home(self) -> Slot:
        role = self.traffic.result
        assert role is not None
        return Slot("out" if role == "part" else role, 0)

    def write(self) -> tuple[ScheduleStep, ...]:
        """Put the steps in order."""
        timed = [self._timed(h, POST) for h in self.hops] + [self._timed(h, RETURN) for h in self.returns]
        groups: defaultdict[_PostKey, list[Hop]] = defaultdict(list)
        for key, hop in zip(timed, [*self.hops, *self.returns], strict=True):
            groups[key].append(hop)
        ordered = sorted(groups.items())
        names = {key: name for name, (key, _) in enumerate(ordered)}
        at: defaultdict[Moment, list[ScheduleStep]] = defaultdict(list)
        for key, hops in ordered:
            at[key.key[0], key.key[1]].append(self._post(names[key], key, hops))
        waits: defaultdict[Moment, list[ScheduleStep]] = defaultdict(list)
        for key, hops in ordered:
            waits[key.wait].append(Wait(names[key]))
            waits[key.wait] += self._folds(key, hops)
        for moment, steps in waits.items():
            at[moment] = [*steps, *at[moment]]
        for step in range(self.grid.world):
            at[step, WORK] += self._compute(self.grid.source(self.rank, step))
        return tuple(s for moment in sorted(at) for s in at[moment])

    def _timed(self, hop: Hop, moment: int) -> _PostKey:
        wait = (hop.due - 1, ARRIVE) if moment == POST else (hop.due, JOIN)
        return _PostKey((hop.post, moment, hop.channel, hop.due), wait)

    def _post(self, name: int, key: _PostKey, hops: Iterable[Hop]) -> Post:
        carries_blocks = key.key[1] == POST
        sends, recvs = [], []
        for hop in sorted(hops):
            if hop.src == self.rank:
                slot = self.held[hop.block] if carries_blocks else self.results[hop.block]
                sends.append(Parcel(hop.dst, slot, hop.block))
            else:
                slot = self.held[hop.block] if carries_blocks else self.arrivals[hop]
                recvs.append(Parcel(hop.src, slot, hop.block))
        return Post(name, key.key[2], tuple(sends), tuple(recvs))

    def _folds(self, key: _PostKey, hops: Iterable[Hop]) -> list[ScheduleStep]:
        if key.key[1] == POST:
            return []
        folds: list[ScheduleStep] = []
        for hop in sorted(h for h in hops if h.dst == self.rank):
            source = self.arrivals[hop]
            target = self._home() if hop.block == self.rank else self.results[hop.block]
            if source != target:
                folds.append(Fold(source, target, hop.block))
        return folds

    def _compute(self, block: int) -> list[ScheduleStep]:
        if not self.needs(self.rank, block):
            return []
        travels_kv = self.traffic.block == "kv"
        q_block, kv_block = (self.rank, block) if travels_kv else (block, self.rank)
        if self.traffic.phase == "forward":
            q: Role = "q"
            results: tuple[Slot, ...] = (Slot("out", 0) if travels_kv else self.results[block],)
        elif travels_kv:
            q, results = "qd", (Slot("dq", 0), self.results[block])
        else:
            q, results = self.traffic.block, (self.results[block], Slot("dkv", 0))
        own_q, own_kv = Slot(q, 0), Slot("kv", 0)
        q_slot, kv_slot = (own_q, self.held[block]) if travels_kv else (self.held[block], own_kv)
        return [Compute(q_block, kv_block, q_slot, kv_slot, results)]
