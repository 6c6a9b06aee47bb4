"""Symbolic run of one rank's program: every slot knows its content, and no step may use it wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from burst.schedules.base import Schedule
from burst.schedules.payload import Role
from burst.schedules.steps import INPUTS, Compute, Fold, Parcel, Post, Regroup, Slot, Wait

Pair = tuple[int, int]  # (query block, key block)
WORKING: dict[Role, tuple[Role, ...]] = {"qkv": ("q", "kv"), "dout": ("qd",)}  # roles that a regrouping makes usable


class ScheduleError(AssertionError):
    """A schedule that would hang, race or compute something else; names the rank and the step."""


@dataclass(frozen=True)
class Content:
    """Content of a slot: a block; of results, the pairs summed so far; of dealt heads, the member's number."""

    block: int
    pairs: frozenset[Pair] = frozenset()
    heads: int | None = None


class SymbolicRank:
    """One rank in the middle of its program. ``sent`` is what its posts carry, as it was when posted."""

    def __init__(self, schedule: Schedule, rank: int, computed: Counter[tuple[int, Pair]]) -> None:
        self.schedule, self.rank, self.computed = schedule, rank, computed
        self.program = schedule.programs[rank]
        self.home, self.member = schedule.block_of(rank), rank % schedule.members
        self.at = 0
        self.posted: dict[int, Post] = {}
        self.sent: dict[tuple[int, Parcel], Content] = {}
        self.slots = self._first_slots()
        self._waited: set[int] = set()
        self._reading: Counter[Slot] = Counter()  # slots of sends under way
        self._writing: set[Slot] = set()  # slots of receives under way
        self._unused: set[tuple[Slot, int]] = set()

    def _first_slots(self) -> dict[Slot, Content]:
        results: tuple[Role, ...] = ("out", "dq", "dkv")
        slots = {Slot(role, 0): Content(self.home) for role in results}
        dealt, backward = bool(self.schedule.heads), self.schedule.phase == "backward"
        for role in INPUTS:
            # The working q, k and v of the forward are still there in the backward.
            if not dealt or (backward and role in ("q", "kv")):
                slots[Slot(role, 0)] = Content(self.home)
        if dealt:
            slots[Slot("qkv", 0)] = slots[Slot("dout", 0)] = Content(self.rank)
        return slots

    @property
    def where(self) -> str:
        """The step that the rank is at, for messages."""
        return f"step {self.at}: {self.program[self.at] if self.at < len(self.program) else 'end'}"

    def waits_for(self) -> int | None:
        """The post that the next step waits for, if it does."""
        step = self.program[self.at]
        return step.name if isinstance(step, Wait) and step.name in self.posted else None

    def run_step(self, arriving: Mapping[tuple[int, Parcel], Content]) -> None:
        """Run the next step; ``arriving`` is what a wait's receives bring. Raises ScheduleError."""
        match self.program[self.at]:
            case Post() as post:
                self._post(post)
            case Wait(name):
                self._wait(name, arriving)
            case Compute() as step:
                self._compute(step)
            case Fold() as step:
                self._fold(step)
            case Regroup() as step:
                self._regroup(step)
        self.at += 1

    def check_end(self) -> None:
        """Require that nothing is under way or was received in vain, and that the results are complete."""
        self._require(self._waited == set(self.posted), "a post is never waited for")
        unused = sorted(u for u in self._unused if u[0].index)
        self._require(not unused, f"received for nothing: {unused}")
        self._complete()
        if self.schedule.heads:
            role = "out" if self.schedule.phase == "forward" else "dqkv"
            last = self.program[-1] if self.program else None
            self._require(isinstance(last, Regroup) and last.role == role, "results stay dealt by heads")

    # -- steps -------------------------------------------------------------------------------------------

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise ScheduleError(f"rank {self.rank}, {self.where}: {message}")

    def _post(self, post: Post) -> None:
        self._require(post.name not in self.posted, "a post of this name has been")
        self.posted[post.name] = post
        for p in post.sends:
            content = self._outgoing(p)
            self._require(content.block == p.block, f"{p.slot} holds {content.block}, not {p.block}")
            self.sent[post.name, p] = content
            self._reading[p.slot] += 1
        for p in post.recvs:
            fixed = p.slot.index == 0 and p.slot.role in (*INPUTS, *WORKING)
            self._require(not fixed, f"{p.slot} is the caller's")
            self._free(p.slot)
            self.slots.pop(p.slot, None)
            self._writing.add(p.slot)

    def _outgoing(self, p: Parcel) -> Content:
        if p.heads is None:
            return self._read(p.slot)
        if p.slot.role in WORKING:
            self._require(p.slot.index == 0 and p.block == self.rank, f"{p.slot} is not the caller's")
            return Content(p.block, heads=p.heads)
        same_group = self.schedule.block_of(p.block) == self.home
        self._require(same_group and p.heads == self.member, "these rows or heads are not this rank's")
        self._complete()
        return Content(p.block, heads=p.heads)

    def _wait(self, name: int, arriving: Mapping[tuple[int, Parcel], Content]) -> None:
        self._require(name in self.posted and name not in self._waited, "waits for no post, or twice")
        self._waited.add(name)
        post = self.posted[name]
        for p in post.sends:
            self._reading[p.slot] -= 1
        for p in post.recvs:
            self._writing.discard(p.slot)
            self.slots[p.slot] = arriving[name, p]
            self._unused.add((p.slot, p.block))

    def _read(self, slot: Slot) -> Content:
        self._require(slot not in self._writing, f"reads {slot} while a receive into it is under way")
        self._require(slot in self.slots, f"reads {slot}, which holds nothing")
        return self.slots[slot]

    def _free(self, slot: Slot) -> None:
        self._require(slot not in self._writing, f"writes {slot} while a receive into it is under way")
        self._require(not self._reading[slot], f"writes {slot} while a send from it is under way")

    def _compute(self, step: Compute) -> None:
        pair = (step.q_block, step.kv_block)
        for slot, block in ((step.q, step.q_block), (step.kv, step.kv_block)):
            held = self._read(slot)
            self._require(held.block == block, f"{slot} holds block {held.block}")
            self._unused.discard((slot, block))
        self._require(bool(self.schedule.pieces(*pair)), "nothing to compute: every pair is masked")
        self.computed[self.member, pair] += 1
        self._require(self.computed[self.member, pair] == 1, "computed a second time")
        for slot in step.results:
            self._free(slot)
            block = step.kv_block if slot.role == "dkv" else step.q_block
            old = self._read(slot) if slot.index == 0 else Content(block)
            self._require(old.block == block, f"{slot} holds results of block {old.block}")
            self.slots[slot] = Content(block, old.pairs | {pair})

    def _fold(self, step: Fold) -> None:
        source, target = self._read(step.source), self._read(step.target)
        self._free(step.target)
        fits = source.block == target.block == step.block
        self._require(fits, f"adds block {source.block} to block {target.block}")
        self._require(not source.pairs & target.pairs, "adds what is already in")
        self.slots[step.target] = Content(step.block, source.pairs | target.pairs)
        self._unused.discard((step.source, step.block))

    def _regroup(self, step: Regroup) -> None:
        s = self.schedule
        going = step.role in WORKING
        self._require(len(step.slots) == s.members, "one slot a member is needed")
        for m, slot in enumerate(step.slots):
            if m == self.member:
                continue
            block, dealt = (self.rank - self.member + m, self.member) if going else (self.rank, m)
            nothing = s.layout.counts[block] == 0 or s.heads[dealt].q_count == 0
            self._require((slot is None) == nothing, f"member {m} brings {slot}")
            if slot is not None:
                held = self._read(slot)
                self._require(held == Content(block, heads=dealt), f"{slot} holds {held}")
                self._unused.discard((slot, block))
        if going:
            for role in WORKING[step.role]:
                self.slots[Slot(role, 0)] = Content(self.home)
        else:
            self._complete()

    def _complete(self) -> None:
        """Require that the rank's results hold every pair they need."""
        s, heads = self.schedule, self.schedule.heads_of(self.rank)
        blocks = range(s.blocks.world) if heads is None or heads.q_count else ()
        queries = frozenset((self.home, k) for k in blocks if s.pieces(self.home, k))
        keys = frozenset((q, self.home) for q in blocks if s.pieces(q, self.home))
        forward: dict[Role, frozenset[Pair]] = {"out": queries}
        backward: dict[Role, frozenset[Pair]] = {"dq": queries, "dkv": keys}
        for role, pairs in (forward if s.phase == "forward" else backward).items():
            held = self._read(Slot(role, 0))
            self._require(held == Content(self.home, pairs), f"{role} is incomplete: {held}, not {pairs}")
