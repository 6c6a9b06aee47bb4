"""One layer of exact attention over hosts as steps of all hosts at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from apb.costs.lockstep import Await, ClockStep, Exchange, Hosts, HostWork, Move, Seconds, shift
from apb.costs.rates import Rates, read
from apb.layers.base import LayerKind
from apb.plan.exact import Spread
from apb.plan.plan import PrefillPlan
from burst.layouts.layout import Layout
from burst.schedules import AttentionShape, Heads, head_split

PIECES = 2  # kernel calls of a pair of blocks in zigzag, at most


def attention(plan: PrefillPlan, kind: LayerKind, rates: Rates, nodes: tuple[int, ...]) -> list[ClockStep]:
    """Return what a layer of this kind does after its projections; ``nodes`` is each host's machine."""
    assert plan.spread is not None
    return _ExactLayer(plan, plan.spread, kind, rates, nodes).steps()


class _ExactLayer:
    def __init__(
        self, plan: PrefillPlan, spread: Spread, kind: LayerKind, rates: Rates, nodes: tuple[int, ...]
    ) -> None:
        self.spread, self.kind, self.rates, self.hosts = spread, kind, rates, plan.hosts
        self.shape: AttentionShape = kind.attention_shape(plan.shape.element_size)
        self.members = spread.members()
        layout = spread.tokens()
        groups = [range(g, g + self.members) for g in range(0, self.hosts, self.members)]
        self.blocks: Layout = layout if self.members == 1 else layout.grouped(groups)
        self.rows = np.asarray(layout.counts)
        self.block_rows = np.asarray(self.blocks.counts)
        self.starts, self.stops = _edges(self.blocks)
        self.first, self.last = self.starts.min(axis=1), self.stops.max(axis=1)
        split = head_split(self.shape.q_heads, self.shape.kv_heads, self.members) if self.members > 1 else ()
        self.heads: tuple[Heads, ...] = split or (Heads(0, self.shape.q_heads, 0, self.shape.kv_heads),)
        self.member = np.arange(self.hosts) % self.members
        self.q_heads = np.array([h.q_count for h in self.heads])[self.member]
        self.lane = self._lane(nodes)

    def steps(self) -> list[ClockStep]:
        """Deal heads out where that is asked for, go round the ring, and give the heads back."""
        inner = self._straight() if self.spread.schedule == "allgather" else self._rings()
        return [*self._border("qkv"), *inner, *self._border("out")]

    def _lane(self, nodes: tuple[int, ...]) -> int:
        """Hosts of an inner ring: those of a machine in ``burst``, where machines are alike; else all."""
        size = nodes.count(nodes[0])
        even = all(len(set(nodes[i : i + size])) == 1 for i in range(0, self.hosts, size)) and self.hosts % size == 0
        return size if self.spread.schedule == "burst" and even and size > 1 else self.hosts // self.members

    def _rings(self) -> list[ClockStep]:
        """Rings of neighbours, and a ring between them whose blocks leave a whole round early."""
        steps: list[ClockStep] = []
        count, size = self.hosts // self.members, self.lane
        for turn in range(count):
            round_, at = divmod(turn, size)
            if at == 0 and turn + size < count:
                steps.append(self._hop(f"round {round_}", turn, size * self.members, None))
            if at < size - 1:
                within = None if size == count else size
                steps.append(self._hop(f"turn {turn}", turn, self.members, within))
            steps.append(self._pairs(turn))
            if at < size - 1:
                steps.append(Await(f"turn {turn}"))
            elif turn + 1 < count:
                steps.append(Await(f"round {round_}"))
        return steps

    def _straight(self) -> list[ClockStep]:
        starts: list[ClockStep] = []
        work: list[ClockStep] = [self._pairs(0)]
        for k in range(1, self.hosts):
            starts.append(Exchange(f"from {k}", self._moves(k, None, lambda s: s)))
            work += [Await(f"from {k}"), self._pairs(k)]
        return [*starts, *work]

    def _hop(self, name: str, turn: int, by: int, within: int | None) -> ClockStep:
        return Exchange(name, self._moves(by, within, lambda host: self._block(host, turn)))

    def _moves(self, by: int, within: int | None, block_of: Callable[[Hosts], Hosts]) -> tuple[Move, ...]:
        row = np.array([self.shape.row_bytes("kv", h) if h.q_count else 0 for h in self.heads])

        def size(source: Hosts, target: Hosts) -> Seconds:
            block = block_of(source // self.members)
            needed = self.last[target // self.members] > self.first[block]
            home = block == target // self.members  # it has come round
            sent: Seconds = self.block_rows[block] * row[self.member[source]] * (needed & ~home).astype(float)
            return sent

        return (shift(self.hosts, by, size, within),)

    def _block(self, group: Hosts, turn: int) -> Hosts:
        """The block that a group works on in that turn."""
        round_, at = divmod(turn, self.lane)
        count = self.hosts // self.members
        node, place = group // self.lane, group % self.lane
        return (node - round_) % (count // self.lane) * self.lane + (place - at) % self.lane

    def _pairs(self, turn: int) -> HostWork:
        """The kernel calls of one turn, and the merging of what they give."""
        group = np.arange(self.hosts) // self.members
        block = group if turn == 0 else self._block(group, turn)
        if self.spread.schedule == "allgather":
            block = (group - turn) % self.hosts
        pairs = _visible(self.starts[group], self.stops[group], self.starts[block], self.stops[block])
        mean, sees = float(self.block_rows.mean()), pairs > 0
        rate = read(self.rates.causal if turn == 0 else self.rates.full, mean)
        seconds = self.kind.pair_flops * self.q_heads * pairs / rate + self.rates.call_s * PIECES * sees
        made = self.q_heads * self.block_rows[block] * sees
        if turn == 0:  # a host's own are among its linear layers
            made = made - self.kind.heads * self.rows
        seconds = seconds + self.kind.expansion_flops * made / read(self.rates.linear, mean)
        rows = self.block_rows[group] * self.q_heads * self.shape.value_dim
        merged = 3 * 4 * rows / self.rates.memory * sees * (turn > 0)
        return HostWork({"attention": seconds, "other": merged})

    def _border(self, role: str) -> list[ClockStep]:
        if self.members == 1:
            return []
        row = np.array([self.shape.row_bytes(role, h) for h in self.heads])  # type: ignore[arg-type]
        held = np.array([h.q_count > 0 for h in self.heads])

        def size(source: Hosts, target: Hosts) -> Seconds:
            heads, rows = (target, source) if role == "qkv" else (source, target)
            sent: Seconds = (self.rows[rows] * row[self.member[heads]] * held[self.member[heads]]).astype(float)
            return sent

        copied = 2 * self.block_rows[np.arange(self.hosts) // self.members] * row[self.member] / self.rates.memory
        moves = tuple(shift(self.hosts, k, size, self.members) for k in range(1, self.members))
        return [Exchange(role, moves), Await(role), HostWork({"other": copied})]


def _edges(blocks: Layout) -> tuple[Hosts, Hosts]:
    """Positions [start, stop) of every block's at most two stretches, an empty one at the first's start."""
    held = [[(s.start, s.stop) for s in spans] or [(0, 0)] for spans in blocks.spans]
    assert all(len(each) <= 2 for each in held), "exact strategies hold one stretch, or one from each end"
    both = np.array([(each * 2)[:2] if len(each) == 2 else [each[0], (each[0][0], each[0][0])] for each in held])
    return both[:, :, 0], both[:, :, 1]


def _visible(q_start: Hosts, q_stop: Hosts, k_start: Hosts, k_stop: Hosts) -> Seconds:
    """Pairs of queries and keys that are not after them, by row of the arrays, over all stretches."""
    total = np.zeros(len(q_start))
    for q in range(2):
        for k in range(2):
            start, length = k_start[:, k], k_stop[:, k] - k_start[:, k]

            def before(x: Hosts, start: Hosts = start, length: Hosts = length) -> Hosts:
                """Pairs of all queries below position x."""
                inside = np.clip(x - start, 0, length)
                found: Hosts = inside * (inside + 1) // 2 + np.maximum(x - start - length, 0) * length
                return found

            total += before(q_stop[:, q]) - before(q_start[:, q])
    return total
