"""Bytes and messages of schedules, against the formulas."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from burst.layouts.layout import layout
from burst.schedules import AttentionShape, Schedule, schedule
from tests.support.schedule_cases import GQA, MHA, spread, total


@pytest.mark.parametrize(("grad_size", "shape"), list(product((2, 4), (MHA, GQA))))
@pytest.mark.parametrize(("world", "nodes"), [(2, 1), (4, 2), (8, 2), (8, 4)])
def test_bytes_are_the_formulas(grad_size: int, shape: AttentionShape, world: int, nodes: int) -> None:
    shape = replace(shape, grad_size=grad_size)
    rows, hops, per_node = 16, world - 1, world // nodes
    lay = layout("zigzag", rows * world, world)
    heads, kv, d, e, eg = shape.q_heads, shape.kv_heads, shape.head_dim, shape.element_size, grad_size
    ring, inter_ring = 2 * hops * rows * kv * d * e, 2 * (nodes - 1) * rows * kv * d * e
    kv_pass = rows * kv * d * (2 * e * hops + 2 * eg * world)
    q_pass = rows * heads * ((2 * d * e + 8) * hops + d * eg * world)
    gather = 2 * hops * rows * kv * d * e + 2 * hops * rows * kv * d * eg

    def made(name: str, phase: str, travels: str = "kv") -> Schedule:
        return schedule(name, lay, shape, phase=phase, nodes=spread(world, nodes), travels=travels)

    for r in range(world):
        for name in ("ring", "double_ring", "burst"):
            assert total(made(name, "forward"), r, shape) == ring
            assert total(made(name, "backward"), r, shape) == kv_pass
            assert total(made(name, "backward", "qd"), r, shape) == q_pass
            assert len(made(name, "forward").sends(r)) == hops
            assert len(made(name, "backward").sends(r)) == 2 * world - 1
            assert total(made(name, "forward", "q"), r, shape) == rows * heads * hops * (2 * d * e + 4)
        assert total(made("allgather", "forward"), r, shape) == ring
        assert total(made("allgather", "backward"), r, shape) == gather
        if nodes > 1 and per_node > 1:
            assert total(made("double_ring", "forward"), r, shape, "inter") == inter_ring
            backward = made("double_ring", "backward").bytes_sent(r, shape)
            assert backward["kv", "inter"] == inter_ring
            assert backward["dkv", "inter"] == 2 * (nodes - 1) * rows * kv * d * eg
            assert backward["dkv", "intra"] == 2 * (nodes * (per_node - 1) + 1) * rows * kv * d * eg


@pytest.mark.parametrize(("world", "members"), [(2, 2), (4, 4), (8, 8), (8, 2), (8, 4), (4, 2)])
def test_bytes_by_heads_are_the_formulas(world: int, members: int) -> None:
    rows, ring_ranks = 16, world // members
    lay = layout("zigzag", rows * world, world)
    for shape in (MHA, GQA):
        kv = max(shape.kv_heads, members)
        d, e, eg = shape.head_dim, shape.element_size, shape.grad_size
        dealt = rows * d * e * (2 * shape.q_heads + 2 * kv) * (members - 1) // members
        going = 2 * (ring_ranks - 1) * rows * kv * d * e
        back = rows * kv * d * (2 * e * (ring_ranks - 1) + 2 * eg * ring_ranks) if ring_ranks > 1 else 0
        name = "ulysses" if members == world else "usp"
        for r in range(world):
            forward = schedule(name, lay, shape, ulysses=members)
            backward = schedule(name, lay, shape, phase="backward", ulysses=members)
            assert total(forward, r, shape) == dealt + going
            assert total(backward, r, shape) == dealt + back


def test_published_figures() -> None:
    """N = 2^20 over 4 nodes of 8, bf16: GB a rank and layer. Source: the formulas of docs/schedules.md."""
    llama_7b = AttentionShape(32, 32, 128, 128)
    llama_8b = AttentionShape(32, 8, 128, 128)
    lay, nodes = layout("zigzag", 2**20, 32), spread(32, 4)

    def gigabytes(shape: AttentionShape, name: str, link: str | None = None, **options: str) -> float:
        return round(total(schedule(name, lay, shape, nodes=nodes, **options), 5, shape, link) / 1e9, 2)

    assert gigabytes(llama_7b, "ring") == 16.64 and gigabytes(llama_8b, "ring") == 4.16
    assert gigabytes(llama_7b, "double_ring", "inter") == 1.61
    assert gigabytes(llama_8b, "burst", phase="backward") == 12.75  # auto: KV-pass
    assert gigabytes(llama_7b, "burst", phase="backward") == 34.08  # auto: Q-pass
    assert gigabytes(llama_7b, "ulysses") == 1.04
    a3 = AttentionShape(4, 4, 64, 64, batch=2, element_size=4)
    assert total(schedule("ring", layout("zigzag", 512, 8), a3), 0, a3) == 1_835_008


def test_what_travels_is_the_cheaper() -> None:
    lay = layout("zigzag", 256, 8)
    for shape, phase, expected in (
        (MHA, "backward", "qd"),
        (GQA, "backward", "kv"),
        (replace(MHA, kv_heads=4), "backward", "kv"),
        (MHA, "forward", "kv"),
    ):
        assert schedule("burst", lay, shape, phase=phase).travels == expected
        assert schedule("ring", lay, shape, phase=phase).travels == "kv"
    few, keys = layout("zigzag", 4096, 8).extend(64)
    assert schedule("ring", few, GQA, keys=keys).travels == "q"
    many, keys = layout("zigzag", 64, 8).extend(4096)
    assert schedule("ring", many, GQA, keys=keys).travels == "kv"
