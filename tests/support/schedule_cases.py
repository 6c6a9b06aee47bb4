"""Shapes, topologies and small helpers that the tests of schedules share."""

from __future__ import annotations

from burst.schedules import AttentionShape, Schedule

GQA = AttentionShape(q_heads=8, kv_heads=2, head_dim=64, value_dim=64)
MHA = AttentionShape(q_heads=8, kv_heads=8, head_dim=64, value_dim=64)
UNEVEN = AttentionShape(q_heads=9, kv_heads=3, head_dim=64, value_dim=32)
TOPOLOGIES = [(p, 1) for p in range(1, 9)] + [(4, 2), (8, 4), (8, 2), (6, 2), (4, 4)]
MASKS: list[tuple[bool, int | None]] = [(True, None), (True, 5), (False, None), (False, 5)]


def ways(name: str, phase: str) -> tuple[str, ...]:
    if name == "allgather":
        return ("kv",)
    return ("kv", "q") if phase == "forward" else ("kv", "qd")


def spread(world: int, nodes: int) -> list[int]:
    return [rank * nodes // world for rank in range(world)]


def total(made: Schedule, rank: int, shape: AttentionShape, link: str | None = None) -> int:
    return sum(count for (_, where), count in made.bytes_sent(rank, shape).items() if link in (None, where))
