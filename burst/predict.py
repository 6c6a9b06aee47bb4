"""How long a schedule takes on a topology: its programs run on a clock, messages share each rank's links."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass

from burst.schedules.base import AttentionShape, Compute, Fold, Parcel, Post, Regroup, Schedule, Step, Wait
from burst.topology import Topology

ACCUMULATE = 4  # bytes of a summed element (fp32)

_Message = tuple[int, int, str, str, int, int | None]  # src, dst, channel, role, block, heads


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of one phase; ``work_s`` by rank is kernels and copies."""

    total_s: float
    work_s: tuple[float, ...]
    sent_bytes: dict[str, int]  # by link class, all ranks
    messages: int  # the most that any rank sends
    workspace_bytes: int  # buffers beside the caller's tensors and the results, the most on any rank

    @property
    def exposed_s(self) -> float:
        """Seconds that the busiest rank's work does not hide: communication, and waiting for it."""
        return self.total_s - max(self.work_s)

    @property
    def imbalance(self) -> float:
        """The busiest rank's work over the mean; 1 is even."""
        mean = sum(self.work_s) / len(self.work_s)
        return max(self.work_s) / mean if mean else 1.0


def work_s(schedule: Schedule, rank: int, step: Step, shape: AttentionShape, topology: Topology) -> float:
    """Return the seconds of one step's own work.

    FLOPs a pair and head: 2 (d + dv) forward; 2 (3 d + 2 dv) backward, scores computed again. Merges, sums
    and copies take the time of reading and writing memory.
    """
    machine, heads = topology.machine, schedule.heads_of(rank)
    q_heads = shape.q_heads if heads is None else heads.q_count
    match step:
        case Compute(q_block=q, kv_block=kv):
            pieces = schedule.pieces(q, kv)
            d, dv = shape.head_dim, shape.value_dim
            each = d + dv if schedule.phase == "forward" else 3 * d + 2 * dv
            flops = 2 * each * q_heads * shape.batch * sum(p.pairs for p in pieces)
            rows = sum(p.q_stop - p.q_start for p in pieces)
            merged = 3 * ACCUMULATE * rows * q_heads * dv * shape.batch  # read both, write one
            return flops / machine.flops + merged / machine.memory + machine.call * len(pieces)
        case Fold(source=source, block=block):
            copied = 3 * schedule.rows(source.role, block) * shape.row_bytes(source.role, heads)
            return copied / machine.memory + machine.call
        case Regroup(role=role):
            group = rank - rank % schedule.members
            rows = sum(schedule.rows(role, group + m) for m in range(schedule.members))
            return 2 * rows * shape.row_bytes(role, heads) / machine.memory + machine.call
        case _:
            return 0.0


def predict(schedule: Schedule, shape: AttentionShape, topology: Topology) -> Prediction:
    """Run the programs on a clock: a message starts when both ends have posted it and their links are free.

    Each rank sends and receives one message at a time per link class, at full bandwidth in both directions.
    """
    work = [[work_s(schedule, r, step, shape, topology) for step in p] for r, p in enumerate(schedule.programs)]
    end = _Clock(schedule, shape, topology, work).run()
    sent: defaultdict[str, int] = defaultdict(int)
    for r in range(schedule.world):
        for (_, link), count in schedule.bytes_sent(r, shape).items():
            sent[link] += count
    return Prediction(
        end,
        tuple(sum(each) for each in work),
        dict(sent),
        max(len(schedule.sends(r)) for r in range(schedule.world)),
        max(workspace_bytes(schedule, r, shape) for r in range(schedule.world)),
    )


def workspace_bytes(schedule: Schedule, rank: int, shape: AttentionShape) -> int:
    """Bytes of the rank's slots 1.., each as large as the largest block that it holds."""
    total = 0
    for slot, blocks in schedule.slot_blocks(rank).items():
        rows = max(schedule.rows(slot.role, block) for block in blocks)
        total += rows * shape.row_bytes(slot.role, schedule.heads_of(rank))
    return total


class _Clock:
    """The ranks' programs in order of time; who waits for a message sleeps until its other end is posted."""

    def __init__(self, schedule: Schedule, shape: AttentionShape, topology: Topology, work: list[list[float]]) -> None:
        self.schedule, self.shape, self.topology, self.work = schedule, shape, topology, work
        self.now = [0.0] * schedule.world
        self.at = [0] * schedule.world
        self.open: defaultdict[_Message, list[tuple[int, int, float]]] = defaultdict(list)  # posted at one end
        self.missing: defaultdict[tuple[int, int], int] = defaultdict(int)  # messages of a post without a time yet
        self.ends: defaultdict[tuple[int, int], float] = defaultdict(float)  # when a post is done
        self.busy: defaultdict[tuple[int, str, str], float] = defaultdict(float)  # (rank, link, direction)
        self.asleep: dict[tuple[int, int], int] = {}

    def run(self) -> float:
        """Return the seconds until the last rank is done."""
        queue = [(0.0, r) for r in range(self.schedule.world)]
        while queue:
            _, r = heapq.heappop(queue)
            for woken in self._advance(r):
                heapq.heappush(queue, (self.now[woken], woken))
        return max(self.now)

    def _advance(self, r: int) -> list[int]:
        """Do one step of rank r; return the ranks that can go on."""
        program = self.schedule.programs[r]
        if self.at[r] >= len(program):
            return []
        step = program[self.at[r]]
        woken = [r]
        match step:
            case Post():
                woken += self._post(r, step)
            case Wait(name):
                if self.missing[r, name]:
                    self.asleep[r, name] = r
                    return []
                self.now[r] = max(self.now[r], self.ends[r, name])
            case _:
                self.now[r] += self.work[r][self.at[r]]
        self.at[r] += 1
        return woken

    def _post(self, r: int, post: Post) -> list[int]:
        woken = []
        for parcel, sends in [*((p, True) for p in post.sends), *((p, False) for p in post.recvs)]:
            self.missing[r, post.name] += 1
            src, dst = (r, parcel.peer) if sends else (parcel.peer, r)
            key = (src, dst, post.channel, parcel.slot.role, parcel.block, parcel.heads)
            waiting = self.open[key]
            if waiting and waiting[0][0] != r:
                other, name, posted = waiting.pop(0)
                end = self._transfer(src, dst, max(posted, self.now[r]), parcel)
                for rank, post_name in ((r, post.name), (other, name)):
                    self.ends[rank, post_name] = max(self.ends[rank, post_name], end)
                    self.missing[rank, post_name] -= 1
                if not self.missing[other, name] and (other, name) in self.asleep:
                    woken.append(self.asleep.pop((other, name)))
            else:
                waiting.append((r, post.name, self.now[r]))
        return woken

    def _transfer(self, src: int, dst: int, posted: float, parcel: Parcel) -> float:
        """Book a message whose ends are both posted; return when it has arrived."""
        link = self.topology.link(src, dst)
        kind = "intra" if self.topology.nodes[src] == self.topology.nodes[dst] else "inter"
        out, into = (src, kind, "out"), (dst, kind, "in")
        start = max(posted, self.busy[out], self.busy[into])
        done = start + self.schedule.parcel_bytes(src, parcel, self.shape) / link.bandwidth
        self.busy[out] = self.busy[into] = done
        return done + link.latency
