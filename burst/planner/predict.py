"""Predicted time of a schedule on a topology: its programs on a clock, with messages sharing each rank's links."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from burst.planner.events import Begin, Busy, Finish, TimelineEvent
from burst.planner.timeline import replay
from burst.planner.topology import Topology
from burst.schedules import AttentionShape, Compute, Fold, Parcel, Post, Regroup, Schedule, ScheduleStep, Wait

ACCUMULATE = 4  # bytes of a summed element (fp32)


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


def work_s(schedule: Schedule, rank: int, step: ScheduleStep, shape: AttentionShape, topology: Topology) -> float:
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
    """Run the programs on a clock (``burst.planner.timeline``)."""
    times = replay([_events(schedule, r, shape, topology) for r in range(schedule.world)], topology)
    sent: defaultdict[str, int] = defaultdict(int)
    for r in range(schedule.world):
        for (_, link), count in schedule.bytes_sent(r, shape).items():
            sent[link] += count
    return Prediction(
        times.total_s,
        times.work_s,
        dict(sent),
        max(len(schedule.sends(r)) for r in range(schedule.world)),
        max(workspace_bytes(schedule, r, shape) for r in range(schedule.world)),
    )


def _events(schedule: Schedule, rank: int, shape: AttentionShape, topology: Topology) -> Iterator[TimelineEvent]:
    """Return one rank's program with sizes and seconds."""

    def sizes(parcels: tuple[Parcel, ...]) -> tuple[tuple[int, int], ...]:
        return tuple((p.peer, schedule.parcel_bytes(rank, p, shape)) for p in parcels)

    for step in schedule.programs[rank]:
        match step:
            case Post():
                yield Begin(step.name, sizes(step.sends), sizes(step.recvs), label=step.channel)
            case Wait(name):
                yield Finish(name)
            case _:
                yield Busy(work_s(schedule, rank, step, shape, topology))


def workspace_bytes(schedule: Schedule, rank: int, shape: AttentionShape) -> int:
    """Bytes of the rank's slots 1.., each as large as the largest block that it holds."""
    total = 0
    for slot, blocks in schedule.slot_blocks(rank).items():
        rows = max(schedule.rows(slot.role, block) for block in blocks)
        total += rows * shape.row_bytes(slot.role, schedule.heads_of(rank))
    return total
