"""Adaptive budgets: lengths for a wanted cost, and as many rows a layer as cover enough of the scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.compress import compressor, rows_to_cover
from apb.engine.engine import Engine
from apb.plan.plan import PromptLengths
from apb.plan.steps import Select, TellRows
from apb.strategies import strategy
from apb.strategies.budget import critical_flops, sent_bytes
from bench.twin import Twin, twin
from burst.errors import UserError
from tests.plan.test_plans import LENGTHS, SHAPE
from tests.strategies.test_passing import requests
from tests.strategies.test_spava import LARGE, SMALL, prefill_in_process, prefill_on_one
from tests.support import scorers, tiny
from tests.support.pool import on_both
from tests.support.tiny import make_prompt, tiny_engine, tiny_llama

TAKING = ["apb", "spava"]
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("apb", {}),
    ("apb", {"passing": "allgather"}),
    ("apb", {"anchor": "shared"}),
    ("spava", {}),
]


# -- a wanted cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", FORMS, ids=str)
@pytest.mark.parametrize("context, shape", [(7300, SMALL), (1501, SMALL), (130_001, LARGE)])
@pytest.mark.parametrize("hosts", [2, 8, 16])
def test_a_cost_is_met_with_no_more_bytes(
    hosts: int, context: int, shape: Any, name: str, options: dict[str, Any]
) -> None:
    lengths = PromptLengths(context=context, head=24, question=20, query=30)
    fixed = strategy(name, **options).plan(lengths, hosts, shape, compressor("query"))
    full = critical_flops(strategy("full").plan(lengths, 1, shape))
    least = strategy(name, **options, passing_len=0, anchor_len=44).plan(lengths, hosts, shape, compressor("query"))
    before = 0
    for step in range(1, 5):
        cost = (critical_flops(least) + step / 4 * (1.3 * critical_flops(fixed) - critical_flops(least))) / full
        made = strategy(name, **options, cost=cost)
        plan = made.plan(lengths, hosts, shape, compressor("query"))
        assert critical_flops(plan) <= cost * full and sent_bytes(plan) <= sent_bytes(fixed)
        # What is left of the cost is less than a longer anchor would take, unless that would send more.
        longer = dataclasses.replace(made, cost=None, anchor_len=plan.anchor_len + 4, passing_len=max(plan.kept_rows))
        if name == "apb":
            same = dataclasses.replace(longer, anchor_len=plan.anchor_len)
            assert plan == same.plan(lengths, hosts, shape, compressor("query"))
        if name == "apb" and plan.anchor_len + 4 <= plan.blocks[0][1] + 20:
            more = longer.plan(lengths, hosts, shape, compressor("query"))
            assert critical_flops(more) > cost * full or sent_bytes(more) > sent_bytes(fixed)
        assert critical_flops(plan) >= before
        before = critical_flops(plan)
    assert before > critical_flops(least)


def test_a_cost_below_the_least_is_refused() -> None:
    lengths = PromptLengths(context=1500, head=24, question=20, query=30)
    for options in ({"cost": 0.01}, {"cost": 0.0}, {"cost": 1.5}, {"cost": 0.2, "anchor_len": 60}):
        with pytest.raises(UserError, match=r"strategy\.cost"):
            strategy("apb", **options).plan(lengths, 8, SMALL, compressor("query"))
    with pytest.raises(UserError, match=r"strategy\.cost"):
        strategy("spava", cost=0.5).plan(lengths, 1, SMALL, compressor("query"))
    fixed = strategy("apb", passing_len=10).plan(lengths, 8, SMALL, compressor("query"))
    capped = strategy("apb", passing_len=10, cost=0.2).plan(lengths, 8, SMALL, compressor("query"))
    assert max(capped.kept_rows) == 10 and capped.anchor_len > fixed.anchor_len


# -- enough of the scores -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.lists(st.floats(0, 1), min_size=12, max_size=12), min_size=1, max_size=4),
    coverage=st.floats(0.01, 0.99),
    most=st.integers(1, 12),
    skip=st.integers(0, 5),
    logits=st.booleans(),
)
def test_the_fewest_rows_that_cover_enough(
    scores: list[list[float]], coverage: float, most: int, skip: int, logits: bool
) -> None:
    x = torch.tensor([scores], dtype=torch.float64) + 1e-3
    count = rows_to_cover(x, "logits" if logits else "shares", coverage, most, skip)
    mass = x[0, :, skip:].exp() if logits else x[0, :, skip:]

    def covered(rows: int) -> float:
        return (mass.topk(rows, dim=-1).values.sum(-1) / mass.sum(-1)).mean().item()

    assert 1 <= count <= most
    if count < min(most, mass.shape[-1]):
        assert covered(count) >= coverage - 1e-9
    if 1 < count <= mass.shape[-1]:
        assert covered(count - 1) < coverage + 1e-9


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, hosts=st.integers(1, 20), form=st.sampled_from(FORMS), coverage=st.floats(0.1, 0.99))
def test_covering_plans_never_allow_more_bytes(
    lengths: PromptLengths, hosts: int, form: tuple[str, dict[str, Any]], coverage: float
) -> None:
    hosts = min(hosts, lengths.context)
    name, options = form
    fixed = strategy(name, **options).plan(lengths, hosts, SHAPE, compressor("query"))
    plan = strategy(name, **options, passing_coverage=coverage).plan(lengths, hosts, SHAPE, compressor("query"))
    assert sent_bytes(plan) <= sent_bytes(fixed)
    assert all(a in (b, b - 1) for a, b in zip(plan.kept_rows, fixed.kept_rows, strict=True))
    if plan.coverage is None:
        assert plan == fixed
        return
    assert all(any(isinstance(s, TellRows) for s in host.steps) for host in plan.host_plans)
    assert {s.coverage for h in plan.host_plans for s in h.steps if isinstance(s, Select)} == {coverage}
    told = 8 * len(plan.kept_rows) * (hosts - 1) * SHAPE.layers
    assert sum(plan.prefill_bytes(rank)["rows"] for rank in range(hosts)) == told


def check(
    name: str, options: dict[str, Any], hosts: int, scorer: Any, written_out: Any, logits: bool, coverage: float
) -> tuple[Engine, Twin, list[list[int]]]:
    """Logits, KV and bytes are the twin's; returns the rows that each block passed, by layer."""
    adapter, prompt = tiny_llama(torch.float64), make_prompt(499)
    turn = tiny.rotation(adapter)
    want = twin(adapter, turn, prompt, name, hosts, select=written_out, coverage=coverage, logits=logits)
    engine = tiny_engine(adapter, strategy(name, **options, passing_coverage=coverage), hosts, scorer)
    handle = engine.prefill(prompt)
    assert (engine.logits(handle) - want.logits).abs().max() < 1e-9
    for rank in range(hosts):
        for layer, kv in enumerate(engine.cluster.host(rank)._caches[handle.id].context):  # type: ignore[attr-defined]
            theirs = want.keys[layer][:, want.rows[rank]]
            torch.testing.assert_close(kv.k_BKTD[0], theirs, atol=1e-9, rtol=0)
    plan = engine.setup.plan(prompt)
    assert plan.coverage == coverage
    passed = [[0] * len(plan.kept_rows) for _ in want.selected]
    for layer, selected_KN in enumerate(want.selected):
        for number, (start, stop) in enumerate(want.sizes.spans):
            rows = _of_block(want, number, start, stop)
            passed[layer][number] = int(selected_KN[0, rows].sum())
    routed = plan.route
    row = plan.shape.kv_row_bytes
    sent = sum(row * sum(r * _sends(plan, n, routed) for n, r in enumerate(rows)) for rows in passed)
    found = handle.metrics["bytes_by_kind"]
    assert found["passing"] == sent <= plan.bytes_by_kind(0)["passing"]
    assert found["rows"] == 8 * len(plan.kept_rows) * (hosts - 1) * plan.shape.layers
    fixed = strategy(name, **options).plan(prompt.lengths, hosts, plan.shape, scorer)
    assert found["passing"] + found["rows"] <= fixed.bytes_by_kind(0)["passing"]
    return engine, want, passed


def _of_block(want: Twin, number: int, start: int, stop: int) -> Tensor:
    """The sequence's rows of one block: those of a host's blocks stand one behind the other."""
    for held, rows in zip(want.sizes.held, want.rows, strict=True):
        at = 0
        for n in held:
            size = want.sizes.spans[n][1] - want.sizes.spans[n][0]
            if n == number:
                assert size == stop - start
                return rows[at : at + size]
            at += size
    raise AssertionError(number)


def _sends(plan: Any, number: int, route: str) -> int:
    """How often a block's row is sent."""
    last = len(plan.kept_rows) - 1
    if route == "direct":
        return len(plan.receivers(number))
    return plan.hosts - 1 if route == "allgather" else last - number


@pytest.mark.parametrize("hosts", [2, 5, 8])
@pytest.mark.parametrize("name, options", FORMS, ids=str)
def test_uneven_rows_equal_the_twin(name: str, options: dict[str, Any], hosts: int) -> None:
    scorer = compressor("query", window=1)
    _, _, passed = check(name, options, hosts, scorer, scorers.Query("mean", "softmax", 1), False, 0.3)
    assert len({r for rows in passed for r in rows if r}) > 1, "rows were the same in every layer"


@pytest.mark.parametrize("select", ["expected", "snapkv", "raw"])
def test_what_scores_measure_is_what_is_covered(select: str) -> None:
    turn = tiny.rotation(tiny_llama(torch.float64))
    scorer: Any
    if select == "raw":
        scorer, out = compressor("query", logits="raw"), scorers.Query("mean", "raw")
    else:
        scorer = compressor(select)
        out = scorers.Expected(turn) if select == "expected" else scorers.SnapKV()
    check("apb", {}, 4, scorer, out, select == "raw", 0.4)


@pytest.mark.parametrize("name", TAKING)
def test_processes_tell_each_other_their_rows(name: str) -> None:
    prompt, world, scorer = make_prompt(200), 4, compressor("query")
    shape = tiny_llama(torch.float32).shape
    plan = strategy(name, passing_coverage=0.3).plan(prompt.lengths, world, shape, scorer)
    assert plan.coverage
    made = requests(prompt, plan)
    found, want = on_both(world, prefill_in_process, prefill_on_one, made)
    for rank, (kv, sent) in enumerate(found):
        torch.testing.assert_close(torch.from_numpy(kv), want[rank][0], atol=1e-5, rtol=1e-5)
        assert sent == want[rank][1] and sent["rows"] == plan.prefill_bytes(rank)["rows"]


@pytest.mark.parametrize("name", TAKING)
@pytest.mark.parametrize("scorer", ["random", "recent", "norm"])
def test_scores_that_say_nothing_of_attention_are_refused(name: str, scorer: str) -> None:
    lengths = PromptLengths(context=302, head=5, question=6, query=11)
    with pytest.raises(UserError, match=f"'{scorer}' orders tokens"):
        strategy(name, passing_coverage=0.9).plan(lengths, 3, SHAPE, compressor(scorer))
    with pytest.raises(UserError, match=r"passing_coverage=1\.0"):
        strategy(name, passing_coverage=1.0).plan(lengths, 3, SHAPE, compressor("query"))
