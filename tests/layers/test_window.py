"""Window layers over hosts: halos straight from their owners, replicas at the end, steps and trees without messages.

Shapes: H query heads, K kv heads, S tokens, D head dim.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.layers.base import Place, Step
from apb.layers.call import AttentionCall
from apb.layers.full import Full
from apb.layers.rows import LayerKV
from apb.layers.sharding import Segment, Sharding
from apb.layers.tree import depths, visible
from apb.layers.window import Window, WindowCache, WindowPrefill
from apb.plan.bytes import bytes_by_kind
from apb.strategies import strategy
from burst.execution.blocks import add_sinks
from burst.kernels import kernel
from burst.kernels.reference import attend
from burst.layouts.layout import layout
from burst.transport import Transport, VirtualWorld
from tests.layers.test_linear_models import prompt
from tests.support.families import adapt_family
from tests.support.planned import planned_twin
from tests.support.tiny import tiny_engine

KERNEL = kernel("reference")


def window(size: int, chunked: bool = False, soft_cap: float | None = None) -> Window:
    return Window(4, 2, 8, 6, sink=True, soft_cap=soft_cap, window=size, chunked=chunked)


def drawn(tokens: int, seed: int = 0) -> AttentionCall:
    """Return queries, keys, values and sinks of a whole sequence, fp64."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, tokens, d, generator=gen, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 6)))
    return AttentionCall(0, q, k, v, 0.5, torch.randn(4, generator=gen, dtype=torch.float64))


def dense(kind: Window, call: AttentionCall, positions: Tensor, seen: Tensor) -> Tensor:
    """Return plain softmax attention (S, H, D) of a sequence with a mask beside the window."""
    reach = torch.tensor([kind.reach(int(p)) for p in positions])
    seen = seen & (positions[None] >= reach[:, None])
    out, lse = attend(call.q_BHSD, call.k_BKSD, call.v_BKSE, False, call.scale, seen, kind.soft_cap)
    assert call.sinks_H is not None
    add_sinks(out, lse, call.sinks_H)
    return out[0].transpose(0, 1)


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def at(sharding: Sharding, rank: int) -> Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in sharding.spans[rank])])


def picked(call: AttentionCall, rows: Tensor) -> AttentionCall:
    q, k, v = (x[:, :, rows] for x in (call.q_BHSD, call.k_BKSD, call.v_BKSE))
    return AttentionCall(call.layer, q, k, v, call.scale, call.sinks_H)


def prefilled(kind: Window, call: AttentionCall, sharding: Sharding) -> tuple[Tensor, list[WindowCache], VirtualWorld]:
    """Run a context over virtual hosts; return the output (S, H, D) in position order, caches, and the world."""
    world = VirtualWorld(sharding.hosts)

    def host(t: Transport) -> tuple[Tensor, WindowCache]:
        rows = at(sharding, t.rank)
        run = kind.prefill([Segment(0, len(rows), sharding, kept=True)], Place(t, KERNEL))
        return run(picked(call, rows))[0], run.cache

    found = world.run(host)
    order = torch.cat([at(sharding, rank) for rank in range(sharding.hosts)]).argsort()
    return torch.cat([out for out, _ in found])[order], [cache for _, cache in found], world


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    """Draw stretches of any lengths, dealt to hosts in any order; some hosts hold none."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))
    hosts = draw(st.integers(1, 6))
    held: list[list[tuple[int, int]]] = [[] for _ in range(hosts)]
    for start, stop in itertools.pairwise([0, *itertools.accumulate(sizes)]):
        rank = draw(st.integers(0, hosts - 1))
        if held[rank] and held[rank][-1][1] == start:
            held[rank][-1] = (held[rank][-1][0], stop)
        else:
            held[rank].append((start, stop))
    return Sharding(tuple(tuple(each) for each in held))


@settings(max_examples=40, deadline=None)
@given(shardings(), st.integers(1, 70), st.booleans())
def test_any_deal_gives_what_one_host_gives(sharding: Sharding, size: int, chunked: bool) -> None:
    kind, call = window(size, chunked, soft_cap=20.0 if size % 3 == 0 else None), drawn(sharding.length)
    got, caches, world = prefilled(kind, call, sharding)
    n = sharding.length
    torch.testing.assert_close(got, dense(kind, call, torch.arange(n), causal(n)), atol=1e-12, rtol=0)
    for t in world.transports:
        assert Counter(t.ledger.by_kind()) == Counter(kind.sent(sharding, t.rank, 8))
    wanted = call.k_BKSD[:, :, kind.reach(n) :]
    for cache in caches:  # the same rows on every host, in order
        assert cache._context is not None and torch.equal(cache._context.k_BKTD, wanted)
        assert cache._context.k_BKTD.numel() == wanted.numel()
    pairs = sum(p - kind.reach(p) + 1 for p in range(n))
    assert sum(kind.flops(sharding, r) for r in range(sharding.hosts)) == pairs * kind.pair_flops * kind.q_heads


def stepped(cache: WindowCache, kind: Window, call: AttentionCall, start: int, parents: Any = None) -> Tensor:
    (t,) = VirtualWorld(1).transports
    return cache.attend(call, Step(Place(t, KERNEL), start, call.tokens, (0,), True, parents))[0]


@pytest.mark.parametrize("size, chunked", [(5, False), (16, False), (200, False), (16, True), (7, True)])
def test_steps_trees_and_forks(size: int, chunked: bool) -> None:
    kind, n = window(size, chunked), 45
    call = drawn(n + 40)
    where = layout("zigzag", n, 3)
    sharding = Sharding(tuple(tuple((s.start, s.stop) for s in held) for held in where.spans))
    _, caches, _ = prefilled(kind, picked(call, torch.arange(n)), sharding)
    cache = caches[1]
    order, length = list(range(n)), n  # rows of ``call`` that stand in the sequence

    def check(cache: WindowCache, new: list[int], parents: tuple[int, ...] | None) -> None:
        rows = torch.tensor([*order, *new])
        deep = depths(parents) if parents is not None else range(len(new))
        positions = torch.tensor([*range(length), *(length + d for d in deep)])
        seen = causal(len(rows))
        if parents is not None:
            seen[len(order) :, len(order) :] = visible(parents)
        want = dense(kind, picked(call, rows), positions, seen)[len(order) :]
        got = stepped(cache, kind, picked(call, torch.tensor(new)), length, parents)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)

    check(cache.fork(), list(range(n, n + 9)), None)  # a question; on a copy
    check(cache, list(range(n, n + 6)), None)
    order, length = [*order, *range(n, n + 6)], length + 6
    parents = (-1, 0, 0, 1, 2, 4, 4, 6)
    for first, kept in ((n + 6, [0, 2, 4, 6, 7]), (n + 14, [0]), (n + 22, [0, 1, 3])):
        check(cache, list(range(first, first + 8)), parents)
        cache.keep(kept)
        order, length = [*order, *(first + row for row in kept)], length + len(kept)
    other = cache.fork()
    cache.restart()
    check(other, [n + 31], None)
    order, length = list(range(n)), n
    check(cache, list(range(n + 30, n + 38)), parents)


def test_without_halos_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, call, sharding = window(9), drawn(40), Sharding((((0, 20),), ((20, 40),)))
    want = dense(kind, call, torch.arange(40), causal(40))
    exchange = WindowPrefill._exchange

    def blank(*given: Any) -> Any:
        rows, at = exchange(*given)
        return None if rows is None else LayerKV(rows.k_BKTD.zero_(), rows.v_BKTE.zero_()), at

    monkeypatch.setattr(WindowPrefill, "_exchange", blank)
    got, *_ = prefilled(kind, call, sharding)
    assert (got - want).abs().max() > 0.05
    monkeypatch.setattr(WindowPrefill, "_exchange", lambda *_: (None, []))
    with pytest.raises(AssertionError):  # rows that are not there are never passed over
        prefilled(kind, call, sharding)


@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_bytes_do_not_grow_with_the_context(name: str) -> None:
    kind = window(128)
    sent = []
    for n in (8_192, 1_048_576):
        where = layout(name, n, 8)
        sharding = Sharding(tuple(tuple((s.start, s.stop) for s in held) for held in where.spans))
        sent.append([kind.sent(sharding, rank, 2)["halo"] for rank in range(8)])
    assert sent[0] == sent[1]
    row = kind.row_bytes(2)
    if name == "contiguous":
        assert sent[0] == [127 * row] * 7 + [7 * 127 * row]  # a halo each; the end goes to all
    assert Full(4, 2, 8, 6).sent(sharding, 0, 2) == {}


FAMILIES = ("gpt_oss", "gemma2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name, options", [("star", {}), ("apb", {"anchor": "shared"}), ("apb", {}), ("spava", {})])
def test_approximate_strategies_are_exact_in_windows(family: str, name: str, options: dict[str, Any]) -> None:
    """Beside a dense twin with true order, each anchor as a sequence of its own, and sinks and caps written out."""
    asked, doubles = prompt(150), adapt_family(family, torch.float64)
    e = tiny_engine(doubles, strategy(name, **options), 3, "norm" if name != "star" else None)
    handle, plan = e.prefill(asked), e.setup.plan(asked)
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(plan, asked.lengths.query)
    want = planned_twin(doubles, lambda q, delta, layer: q, asked, plan, e.setup.compressor)
    assert (handle.logits() - want.logits).abs().max() < 1e-5  # norms compute in fp32
