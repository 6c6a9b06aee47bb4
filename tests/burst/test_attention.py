"""Distributed attention against dense attention in fp64: every layout, schedule, kind of heads and traveller.

Shapes: B batch, H query heads, K kv heads, N tokens, S own tokens, D head dim, E value dim.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from burst.execution.attend import attention
from burst.layouts.layout import layout
from burst.planner.planner import plan
from burst.planner.topology import MACHINES, Link, topology
from burst.schedules import schedule
from burst.transport import Transport, VirtualWorld, run_virtual
from tests.support.attention_cases import HEADS, LAYOUTS, SCHEDULES, Case, compute, dense, inputs, matrix, run

SIZES = [  # heads, head dim, value dim, batch
    ((4, 2), 32, 32, 3),
    ((4, 4), 80, 80, 1),
    ((2, 1), 192, 128, 1),
    ((2, 2), 16, 40, 2),
    ((2, 1), 256, 256, 1),
]
SHORT = [c for c in matrix() if c.edges[-1] <= 256]
LONG = [c for c in matrix() if c.edges[-1] in (1050, 4232)]


def check(cases: list[Case]) -> None:
    failed = {case.key: row for case in cases if not (row := run(case))["ok"]}
    assert not failed


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("way", SCHEDULES)
def test_exact_with_bytes_and_messages_as_counted(world: int, way: str) -> None:
    mine = [c for c in SHORT if c.world == world and c.schedule == way]
    check(random.Random(f"{world}{way}").sample(mine, 7))


@pytest.mark.parametrize("edges", [(0, 1050), (0, 120, 1248, 4232)])
def test_exact_long(edges: tuple[int, ...]) -> None:
    cases = [c for c in LONG if c.edges == edges and c.heads == (4, 1) and c.window == 9 and c.world < 8]
    check(random.Random(0).sample(cases, 2))
    cases = [c for c in LONG if c.edges == edges and c.heads == (4, 1) and c.causal and not c.window]
    check(random.Random(0).sample(cases, 2))


@pytest.mark.parametrize("way", SCHEDULES)
def test_exact_with_soft_caps(way: str) -> None:
    base = Case(4, schedule=way, backward="kv", heads=(4, 2), edges=(0, 57), soft_cap=0.7, scale=1.5, value_dim=12)
    per_node = 2 if way in ("burst", "double_ring", "usp") else None
    check([replace(base, per_node=per_node, **options) for options in ({"sinks": True}, {"window": 9})])


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("backward", ["kv", "q"])
def test_exact_with_every_size_and_scale(where: str, backward: str) -> None:
    for heads, dim, value_dim, batch in SIZES:
        check(
            [
                Case(
                    3,
                    where,
                    "ring",
                    backward,
                    heads,
                    (0, 50),
                    dim=dim,
                    value_dim=value_dim,
                    batch=batch,
                    scale=0.3,
                )
            ]
        )


def test_auto_takes_the_planners_choice() -> None:
    check([Case(4, schedule="burst", backward="auto", heads=heads, edges=(0, 64), per_node=2) for heads in HEADS])
    case = Case(4, schedule="auto", backward="auto", edges=(0, 64), per_node=2)
    got, _ = compute(case)
    assert all((x - y).abs().max() <= 1e-11 for x, y in zip(got, dense(case), strict=True))


@pytest.mark.parametrize("travels", ["kv", "q"])
def test_auto_keeps_to_the_traveller_that_is_given(travels: str) -> None:
    where, (q, k, v, _, _) = layout("zigzag", 64, 4), inputs((4, 1), 64, 8, 8, 1)
    far = topology(4, 1, replace(MACHINES["cpu"], intra=Link(1e12, 1.0)))  # seconds before the first byte
    assert plan(where, Case(4, heads=(4, 1)).shape(), far).chosen.name == "allgather"  # queries cannot travel in it

    def rank(t: Transport) -> set[str]:
        own = [where.shard(x, t.rank, 2) for x in (q, k, v)]
        attention(*own, transport=t, layout=where, topology=far, forward=travels)
        return set(t.ledger.by_kind()) & {"kv", "q", "part"}

    sent = run_virtual(4, rank)
    assert "kv" not in set().union(*sent) if travels == "q" else sent == [{"kv"}] * 4


@pytest.mark.parametrize("name", ["zigzag", "striped", "contiguous"])
@pytest.mark.parametrize("forward", ["kv", "q", "auto"])
def test_a_chunk_after_history_equals_one_call(name: str, forward: str) -> None:
    old, new, world = 37, 23, 3
    case = Case(world, heads=(8, 2), edges=(0, old + new))
    q, k, v, _, _ = inputs(case.heads, old + new, 8, 8, 1)
    history = layout(name, old, world)
    chunk, keys = history.extend(new)
    want = dense(case)[0][:, :, old:]

    def rank(t: Transport) -> Tensor:
        k_own, v_own = (
            torch.cat([history.shard(x[:, :, :old], t.rank, 2), chunk.shard(x[:, :, old:], t.rank, 2)], 2)
            for x in (k, v)
        )
        q_own = chunk.shard(q[:, :, old:], t.rank, 2)
        out = attention(q_own, k_own, v_own, transport=t, layout=chunk, keys=keys, schedule="ring", forward=forward)
        assert isinstance(out, Tensor)
        return out

    world_of = VirtualWorld(world)
    out = chunk.unshard(world_of.run(rank), 2)
    assert (out - want).abs().max() <= 1e-12
    plan = schedule("ring", chunk, case.shape(), keys=keys, travels=forward)
    for t in world_of.transports:
        booked = {key: n for key, n in t.ledger.entries().items() if key[0] != "agree"}
        assert booked == plan.bytes_sent(t.rank, case.shape())


@pytest.mark.parametrize("way", ["ring", "double_ring", "burst", "allgather"])
@pytest.mark.parametrize("backward", ["kv", "q"])
def test_gradients_reach_the_history(way: str, backward: str) -> None:
    if way == "allgather" and backward == "q":
        pytest.skip("only keys and values travel in an all-gather")
    old, n, world, window = 31, 44, 4, 9
    case = Case(world, heads=(7, 1), edges=(0, n), window=window)
    q, k, v, dout, sinks = inputs(case.heads, n, 8, 8, 1)
    chunk, keys = layout("zigzag", old, world).extend(n - old)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    gap = torch.arange(old, n)[:, None] - torch.arange(n)
    scores = (leaves[0][:, :, old:] @ leaves[1].mT * 8**-0.5).masked_fill((gap < 0) | (gap >= window), -torch.inf)
    weights = torch.cat([scores, leaves[3][:, None, None].expand(*scores.shape[1:3], 1)[None]], -1).softmax(-1)
    want = torch.autograd.grad(weights[..., :-1] @ leaves[2], leaves, dout[:, :, old:])

    def rank(t: Transport) -> list[Tensor]:
        held = keys.positions(t.rank)
        own = [chunk.shard(q[:, :, old:], t.rank, 2), k[:, :, held], v[:, :, held], sinks.clone()]
        own = [x.requires_grad_() for x in own]
        options = {"schedule": way, "backward": backward, "window": window, "sinks": own[3]}
        out = attention(*own[:3], transport=t, layout=chunk, keys=keys, **options)
        return list(torch.autograd.grad(out, own, chunk.shard(dout[:, :, old:], t.rank, 2)))

    found = run_virtual(world, rank, nodes=(0, 0, 1, 1))
    dq = chunk.unshard([grads[0] for grads in found], 2)
    dk, dv = (torch.zeros_like(k), torch.zeros_like(v))
    for r, grads in enumerate(found):
        dk[:, :, keys.positions(r)], dv[:, :, keys.positions(r)] = grads[1], grads[2]
    got = (dq, dk, dv, sum(grads[3] for grads in found))
    for x, y in zip(got, (want[0][:, :, old:], *want[1:]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


def test_a_second_derivative_is_refused() -> None:
    where, (q, k, v, _, _) = layout("zigzag", 16, 2), inputs((2, 1), 16, 8, 8, 1)

    def rank(t: Transport) -> None:
        own = [where.shard(x, t.rank, 2).requires_grad_() for x in (q, k, v)]
        out = attention(*own, transport=t, layout=where, schedule="ring")
        (dq,) = torch.autograd.grad(out.square().sum(), own[:1], create_graph=True)
        dq.sum().backward()

    with pytest.raises(RuntimeError, match="differentiate twice"):
        run_virtual(2, rank)


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("way", SCHEDULES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.75, 1.0])
def test_checkpoint_gives_the_same_gradients(where: str, way: str, kept: float) -> None:
    for edges in ((0, 64), (0, 7, 20, 61)):
        case = Case(4, where, way, heads=(4, 2), edges=edges, sinks=True, per_node=2)
        # Not the same bits: with fewer rows a call, the kernel takes other tiles.
        plain, again = compute(case)[0], compute(replace(case, checkpoint=kept))[0]
        assert all(torch.allclose(x, y, rtol=0, atol=1e-14) for x, y in zip(plain, again, strict=True))


def test_checkpoint_keeps_and_computes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from burst.execution import attend as module

    n, kept, areas = 64, 0.5, []
    case = Case(4, heads=(2, 2), edges=(0, n), checkpoint=kept)
    real = module._complete

    def counted(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, call: Any) -> Any:
        rank = call.transport.rank
        assert call.again is not None and out.shape[2] == lse.shape[2] == n // 4 * kept
        areas.append(call.again.layout.pairs(rank))
        return real(q, k, v, out, lse, sinks, call)

    monkeypatch.setattr(module, "_complete", counted)
    compute(case)
    whole = sum(layout("zigzag", n, 4).pairs(r) for r in range(4))
    assert sum(areas) == pytest.approx((1 - kept) ** 2 * whole, rel=2 / n)


def test_return_lse() -> None:
    q, k, v, _, _ = inputs((4, 2), 50, 8, 8, 1)
    for way in SCHEDULES:
        where = layout("zigzag", 50, 4)

        def rank(t: Transport, way: str = way, where: Any = where) -> Tensor:
            own = [where.shard(x, t.rank, 2).requires_grad_() for x in (q, k, v)]
            out, lse = attention(*own, transport=t, layout=where, schedule=way, return_lse=True)
            with torch.no_grad():
                _, again = attention(*own, transport=t, layout=where, schedule=way, return_lse=True)
            assert torch.equal(lse, again) and not lse.requires_grad and out.requires_grad
            return lse

        got = where.unshard(run_virtual(4, rank, nodes=(0, 0, 1, 1)), 2)
        scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
        hidden = torch.ones(50, 50, dtype=torch.bool).triu(1)
        assert torch.allclose(got, scores.masked_fill(hidden, -torch.inf).logsumexp(-1), atol=1e-12)


@pytest.mark.parametrize("ranks, nodes", [(2, 2), (4, 2), (2, 4), (3, 2)])
def test_double_ring_crosses_nodes_once_a_node(ranks: int, nodes: int) -> None:
    world = ranks * nodes
    flat = Case(world, schedule="ring", heads=(4, 2), edges=(0, 24 * world), causal=False, per_node=ranks)
    want, ring = compute(flat)
    got, double = compute(replace(flat, schedule="double_ring"))
    assert all((x - y).abs().max() <= 1e-12 for x, y in zip(want, got, strict=True))
    block = 24 * flat.shape().row_bytes("kv")
    for one, two in zip(ring.transports, double.transports, strict=True):
        # In the backward keys and values travel the same way again.
        assert two.ledger.entries()["kv", "inter"] == 2 * (nodes - 1) * block
        assert one.ledger.by_kind() == two.ledger.by_kind()


def test_published_number_of_bytes() -> None:
    # MHA forward, B = 2, H = 4, N = 512, D = 64, fp32, P = 8.
    case = Case(8, heads=(4, 4), edges=(0, 512), dim=64, value_dim=64, batch=2, dtype=torch.float32)
    _, world = compute(case)
    half = [t.ledger.entries()["kv", "intra"] // 2 for t in world.transports]  # the backward's keys are as many
    assert half == [1_835_008] * 8 and all(t.ledger.messages()["kv"] == 2 * 7 for t in world.transports)


def test_window_skips_hops() -> None:
    case = Case(8, "contiguous", heads=(2, 1), edges=(0, 800))
    whole, narrow = (compute(replace(case, window=w))[1] for w in (None, 60))
    assert [t.ledger.messages()["kv"] for t in narrow.transports[:-1]] == [2] * 7  # to the next rank, both phases
    assert sum(t.ledger.by_kind().get("kv", 0) for t in narrow.transports) * 4 == sum(
        t.ledger.by_kind().get("kv", 0) for t in whole.transports
    )
