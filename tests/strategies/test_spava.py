"""Two blocks a host and an anchor computed once: plans as data, and what hosts compute beside the recomputed form."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.compress import compressor
from apb.host.host import Host
from apb.host.messages import HostSpec, PrefillRequest
from apb.layers.full import Full
from apb.plan.bytes import bytes_by_kind, prefill_bytes
from apb.plan.flops import critical_flops, prefill_flops
from apb.plan.plan import PrefillPlan
from apb.plan.report import host_rows
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.steps import Attend, GatherAnchor, Select
from apb.strategies import Strategy, strategy
from apb.strategies.anchored import even_shares
from apb.strategies.spava import Spava
from bench.ruler.budget import fit
from burst.errors import UserError
from burst.transport import Transport
from burst.transport.process_group import ProcessGroupTransport
from tests.compress.test_compressors import pair
from tests.plan.test_plans import LENGTHS, SHAPE
from tests.strategies.test_passing import CONTEXT, LAYERS, Event, requests, virtual_events
from tests.strategies.test_strategies import check
from tests.support import tiny
from tests.support.pool import Rank, on_both
from tests.support.tiny import make_prompt, tiny_engine, tiny_llama

SMALL = ModelShape(30, 576, 1536, (Full(9, 3, 64, 64),) * 30, 49152, 106_168_320, 28_311_552, 134_515_008, 4, 8192)
LARGE = ModelShape(
    32, 4096, 14336, (Full(32, 8, 128, 128),) * 32, 128256, 6_979_321_856, 525_336_576, 8_030_261_248, 2, 131072
)


@pytest.mark.parametrize("options", [{}, {"lengths": "published"}], ids=str)
@pytest.mark.parametrize("context, shape", [(7300, SMALL), (1501, SMALL), (32768, LARGE), (130_001, LARGE)])
@pytest.mark.parametrize("hosts", range(2, 17))
def test_all_hosts_work_alike(hosts: int, context: int, shape: ModelShape, options: dict[str, Any]) -> None:
    lengths = PromptLengths(context=context, head=24, question=20, query=30)
    plan = strategy("spava", **options).plan(lengths, hosts, shape, compressor("query"))
    work = [prefill_flops(plan, rank) for rank in range(hosts)]
    assert max(work) <= 1.05 * min(work)
    assert [row["prefill_flops"] for row in host_rows(plan)] == work
    # The anchor's tokens run through the linear layers once, on all hosts together.
    assert sum(h.tokens_run for h in plan.host_plans) == context + plan.anchor_len
    default = context // 64 if options else context // hosts // 4
    assert plan.anchor_len == max(default, 24 + 20)


def test_the_arithmetic_of_the_embedded_model() -> None:
    lengths = PromptLengths(context=7300, head=24, question=10, query=20)
    full = prefill_flops(strategy("full").plan(lengths, 1, SMALL), 0)

    def shares(name: str, **options: Any) -> tuple[float, float]:
        plan = strategy(name, **options).plan(lengths, 8, SMALL, compressor("query"))
        work = [prefill_flops(plan, rank) / full for rank in range(8)]
        return sum(work), max(work)

    assert shares("spava") == pytest.approx((0.601, 0.0754), abs=5e-4)
    # The anchor's even share of 1/8 on the last host would make it 0.087.
    assert shares("apb", anchor="shared") == pytest.approx((0.6287, 0.0847), abs=5e-4)
    assert shares("apb") == pytest.approx((0.7197, 0.0995), abs=5e-4)


@settings(max_examples=200, deadline=None)
@given(
    lengths=LENGTHS,
    hosts=st.integers(1, 20),
    made=st.sampled_from(
        [
            strategy("spava"),
            strategy("spava", lengths="published"),
            strategy("apb", anchor="shared"),
            strategy("apb", anchor="shared", passing="allgather"),
        ]
    ),
    scorer=st.sampled_from(["query", "norm"]),
)
def test_plans_with_a_shared_anchor_hold_together(
    lengths: PromptLengths, hosts: int, made: Strategy, scorer: str
) -> None:
    hosts = min(hosts, lengths.context)
    plan = made.plan(lengths, hosts, SHAPE, compressor(scorer))
    spans = sorted(span for host in plan.host_plans for span in host.spans)
    assert spans[0][0] == 0 and spans[-1][1] == lengths.context and len(plan.kept_rows) == len(spans)
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(spans))
    assert {stop - start for start, stop in spans} <= {lengths.context // len(spans) + i for i in (0, 1)}
    if made.name == "spava" and hosts > 1:
        assert len(spans) == min(2 * hosts, lengths.context)
        assert all(sum(numbers) == 2 * hosts - 1 for numbers in plan.numbers if len(numbers) == 2)
        assert [numbers[0] for numbers in plan.numbers] == list(range(hosts))
    check_attention(plan, spans)
    asked = any(isinstance(s, GatherAnchor) and s.question for h in plan.host_plans for s in h.steps)
    assert asked == (scorer == "query" and any(plan.kept_rows) and hosts > 1)
    rows = [plan.question_rows(rank) for rank in range(hosts)]
    assert sum(stop - start for start, stop in rows) == (plan.question_len if hosts > 1 else 0)
    row = 2 * SHAPE.heads.kv_heads * SHAPE.heads.qk_dim * SHAPE.element_size
    asked_row = SHAPE.heads.q_heads * SHAPE.heads.qk_dim * SHAPE.element_size
    anchor = row * plan.anchor_len + (asked_row * plan.question_len if asked else 0)
    assert bytes_by_kind(plan, 0).get("anchor", 0) == anchor * (hosts - 1) * SHAPE.layers


def check_attention(plan: PrefillPlan, spans: list[tuple[int, int]]) -> None:
    """Every query-key pair of the rules is computed once: the anchor in itself, and each block's own."""
    start = 0
    for host, numbers in zip(plan.host_plans, plan.numbers, strict=True):
        for place, number in enumerate(numbers):
            size = spans[number][1] - spans[number][0]
            calls = [s for s in host.steps if isinstance(s, Attend) and s.queries == "block" and s.block == place]
            seen = (plan.anchor_len if number else 0) + sum(plan.kept_rows[:number])
            assert sum(s.pairs for s in calls if s.causal) == size * (size + 1) // 2
            assert sum(s.pairs for s in calls if not s.causal) == size * seen
            selected = [s for s in host.steps if isinstance(s, Select) and s.block == place]
            assert sum(s.rows for s in selected) == plan.kept_rows[number] <= size
            assert all(s.skip + s.rows <= size for s in selected)
        if plan.hosts > 1:
            assert host.anchor_start == start
            start += host.anchor_len
            anchor = [s.pairs for s in host.steps if isinstance(s, Attend) and s.queries == "anchor"]
            assert sum(anchor) == sum(range(host.anchor_start + 1, start + 1))
    assert start == plan.anchor_len


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(0, 3000), st.integers(1, 10**4))
def test_even_shares_leave_the_busiest_host_as_little_as_possible(work: list[int], tokens: int, each: int) -> None:
    shares = even_shares(work, tokens, each)
    assert sum(shares) == tokens and min(shares) >= 0
    top = max(w + s * each for w, s in zip(work, shares, strict=True) if s) if tokens else 0
    # Below that level there is no room for all tokens, whoever takes them.
    assert tokens == 0 or sum(max(0, (top - 1 - w) // each) for w in work) < tokens


# -- what is computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("passing", ["ring", "allgather"])
@pytest.mark.parametrize("hosts", range(1, 9))
@pytest.mark.parametrize("select", ["query", "norm"])
def test_a_shared_anchor_equals_the_twin(select: str, hosts: int, passing: str) -> None:
    check("apb", hosts, select, lengths=(499, 5, 6), passing=passing, anchor="shared")


@pytest.mark.parametrize("select", ["query", "norm"])
@pytest.mark.parametrize("lengths", [(701, 5, 6), (131, 2, 40), (17, 3, 2)])
def test_published_lengths_equal_the_twin(lengths: tuple[int, int, int], select: str) -> None:
    check("spava", 5, select, lengths=lengths, published=True)


def test_a_shared_anchor_gives_what_recomputed_ones_give() -> None:
    prompt, found = make_prompt(499), []
    for form in ("recomputed", "shared"):
        engine = tiny_engine(tiny_llama(torch.float64), strategy("apb", anchor=form), 5, "query")
        handle = engine.prefill(prompt)
        kept = [tiny.shards(engine.cluster.host(rank)._caches[handle.id]) for rank in range(5)]
        logits = engine.logits(handle)
        found.append((logits, kept, engine.generate(handle, max_new_tokens=8).token_ids))
        assert ("anchor" in handle.metrics["bytes_by_kind"]) == (form == "shared")
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-9, rtol=0)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.k_BKTD.shape == b.k_BKTD.shape  # the anchor is dropped
            torch.testing.assert_close(a.k_BKTD, b.k_BKTD, atol=1e-9, rtol=0)
            torch.testing.assert_close(a.v_BKTE, b.v_BKTE, atol=1e-9, rtol=0)
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("select", ["query", "retaining"])
@pytest.mark.parametrize("hosts", [1, 2, 5])
def test_a_question_in_the_blocks_own_pass_gives_what_its_own_pass_gives(
    hosts: int, select: str, tmp_path: Path
) -> None:
    adapter, prompt, found = tiny_llama(torch.float64), make_prompt(499), []
    scorer = pair("retaining:ours" if select == "retaining" else "query", tmp_path, tiny.rotation(adapter))[0]
    assert prompt.question is not None
    m = len(prompt.question.query_ids)
    for fused in (True, False):
        engine = tiny_engine(adapter, Unfused() if not fused else strategy("spava"), hosts, scorer)
        runs, keep = collector()
        count = adapter._base.register_forward_hook(keep, with_kwargs=True)
        handle = engine.prefill(prompt)
        count.remove()
        tokens = [host.tokens_run for host in engine.setup.plan(prompt).host_plans]
        assert sorted(runs) == sorted([t + m for t in tokens] if fused else [*tokens, *[m] * hosts])
        assert handle.metrics["bytes_by_kind"] == bytes_by_kind(engine.setup.plan(prompt), m)
        again = engine.logits(handle.fork(query=prompt.question))
        found.append((engine.logits(handle), again, engine.generate(handle, max_new_tokens=8).token_ids))
    assert found[0][2] == found[1][2]
    for one, other in ((found[0][0], found[1][0]), (found[0][0], found[0][1])):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def collector() -> tuple[list[int], Any]:
    """A list, and a hook that puts the number of tokens of every forward pass there."""
    runs: list[int] = []
    return runs, lambda module, args, given, out: runs.append(given["input_ids"].shape[1])


@dataclasses.dataclass(frozen=True)
class Unfused(Spava):
    """spava with a pass of its own for the question."""

    def plan(self, *args: Any, **options: Any) -> PrefillPlan:
        return dataclasses.replace(super().plan(*args, **options), fused=False)


def test_a_cache_of_two_blocks_a_host_knows_where_tokens_are() -> None:
    engine = tiny_engine(tiny_llama(torch.float32), strategy("spava"), 3, "norm")
    handle = engine.prefill(make_prompt(50, question=0))  # blocks of 9, 9, 8, 8, 8, 8
    assert handle.conditioned_on is None and not handle.exact
    assert [handle.locate(p) for p in (0, 8, 9, 18, 26, 33, 34, 42, 49)] == [
        (0, 0),
        (0, 8),
        (1, 0),
        (2, 0),
        (2, 8),
        (2, 15),
        (1, 9),
        (0, 9),
        (0, 16),
    ]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("spava", {"lengths": "publish"}, "strategy.lengths"),
        ("apb", {"anchor": "once"}, "strategy.anchor"),
        ("spava", {"passing_len": 101}, "passing_len=101"),
        ("spava", {"passing_len": -1}, "passing_len=-1"),
        ("spava", {"anchor_len": 10}, "11 to 57"),
        ("spava", {"anchor_len": 58}, "11 to 57"),  # block 0 has 51 tokens
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    lengths = PromptLengths(context=302, head=5, question=6, query=11)
    with pytest.raises(UserError, match=words):
        strategy(name, **options).plan(lengths, 3, SHAPE, compressor("query"))


@pytest.mark.parametrize("hosts", [0, -1, 8])
def test_hosts_that_nothing_can_be_given_to_are_refused(hosts: int) -> None:
    lengths = PromptLengths(context=7, head=1, question=1, query=3)
    with pytest.raises(UserError):
        strategy("spava").plan(lengths, hosts, SHAPE, compressor("norm"))
    assert strategy("spava").plan(dataclasses.replace(lengths, context=8), 8, SHAPE, compressor("norm")).hosts == 8


def test_lengths_are_fitted_to_a_cost() -> None:
    prompt = make_prompt(1503, head=20, question=30)
    setups = [tiny_engine(tiny_llama(torch.float32), strategy(name), 8, "query").setup for name in ("apb", "spava")]
    flops = critical_flops(setups[0].plan(prompt))
    fitted = fit(setups[1], prompt.lengths, flops=flops)
    plan = fitted.plan(prompt.lengths, 8, setups[1].shape, compressor("query"))
    assert 0.97 * flops < critical_flops(plan) <= flops
    assert plan.kept_rows[1] > 2 * setups[1].plan(prompt).kept_rows[1]


# -- two blocks a host and a shared anchor ----------------------------------------------------------------


def check_rounds(events: list[Event], hosts: int, asks: bool) -> None:
    """Per layer: what is sent is here before anyone waits for it, and blocks are attended to in between.

    Where selection asks the question, it must wait for the anchor; the first block's own attention hides that, and the
    second block's hides the passing. The first block attends to passed rows while the second one's are under way.
    """
    for layer in range(LAYERS):
        steps = [f"layer {layer}: {name}" for name in ("anchor", "passing 0", "passing 1")]
        for step in steps:
            mine = [e for e in events if e[2] == step]
            arrived = [i for i, e in enumerate(mine) if e[1] == "arrive"]
            waited = [i for i, e in enumerate(mine) if e[1] == "wait"]
            assert arrived and max(arrived) < min(waited), f"{step} was still under way when a rank waited"
            assert len(waited) == len([e for e in mine if e[1] == "post"]) == hosts
        for rank in range(hosts):
            mine = [e[1:] for e in events if e[0] == rank]
            at = {(kind, step): mine.index((kind, step, -1)) for kind in ("post", "wait") for step in steps}
            anchor, first, second = steps

            def hidden(step: str, mine: list[Any] = mine, at: dict[Any, int] = at) -> list[str]:
                between = mine[at["post", step] : at["wait", step]]
                return [kind for event, kind, rows in between if event == "attend" and rows >= CONTEXT // (2 * hosts)]

            assert hidden(anchor)[0] == "causal" and "causal" in hidden(first) and len(hidden(first)) < 3
            assert len(hidden(second)) == len(hidden(first)) + (1 if rank else 0)  # block 0 attends to itself alone
            assert at["post", anchor] < at["post", first] < at["post", second]
            assert (at["wait", anchor] < at["post", first]) == asks
            assert at["post", second] < at["wait", first] < at["wait", second]


@pytest.mark.parametrize("select", ["query", "norm"])
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_one_block_is_passed_while_the_other_is_attended_to(hosts: int, select: str) -> None:
    check_rounds(virtual_events(hosts, "spava", select), hosts, asks=select == "query")


def test_the_check_finds_rows_that_are_received_only_in_wait() -> None:
    with pytest.raises(AssertionError, match="passing 0 was still under way"):
        check_rounds(virtual_events(3, "spava", lazy=True), 3, asks=True)


# -- processes ------------------------------------------------------------------------------------------


def prefill_on_one(t: Transport, made: list[PrefillRequest]) -> tuple[Tensor, dict[str, int]]:
    """Prefill one host's share; returns the last layer's KV and what was sent."""
    report = Host(HostSpec("tiny", "float32", "cpu"), t, tiny_llama(torch.float32))
    sent = report.prefill(made[t.rank]).bytes_by_kind
    cache = report._caches["a"].layers[-1].context
    return torch.stack([cache.k_BKTD, cache.v_BKTE]), sent


def prefill_in_process(me: Rank, made: list[PrefillRequest]) -> tuple[Any, dict[str, int]]:
    kv, sent = prefill_on_one(ProcessGroupTransport(timeout_s=30.0), made)
    return kv.numpy(), sent


@pytest.mark.parametrize("name, options", [("spava", {}), ("apb", {"anchor": "shared"})])
def test_processes_compute_what_virtual_hosts_do(name: str, options: dict[str, Any]) -> None:
    prompt, world = make_prompt(CONTEXT), 4
    plan = strategy(name, **options).plan(prompt.lengths, world, tiny_llama(torch.float32).shape, compressor("query"))
    made = requests(prompt, plan)
    found, want = on_both(world, prefill_in_process, prefill_on_one, made)
    for rank, (kv, sent) in enumerate(found):
        torch.testing.assert_close(torch.from_numpy(kv), want[rank][0], atol=1e-5, rtol=1e-5)
        assert sent.pop("agree") == 32 * (world - 1)
        assert sent == {kind: count for kind, count in prefill_bytes(plan, rank).items() if count}
