"""Plans and options as data: what is refused, and what holds for any length and any number of hosts."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.compress import Candidates, compressor, top_rows
from apb.engine.engine import Engine
from apb.layers.full import Full
from apb.plan.bytes import bytes_by_kind, partial_bytes, passing_bytes
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.steps import Attend, Select
from apb.strategies import Strategy, strategy
from burst.errors import UserError
from tests.support.tiny import tiny_engine, tiny_llama

SHAPE = ModelShape(
    layers=3,
    hidden=64,
    intermediate=96,
    mixers=(Full(4, 2, 16, 16),) * 3,
    vocab=100,
    linear_params=1000,
    head_params=100,
    total_params=2000,
    element_size=4,
    max_positions=10**9,
)


@pytest.mark.parametrize(
    "options",
    [{"anchor_len": 10}, {"anchor_len": 108}, {"anchor_len": -1}, {"passing_len": 101}, {"passing_len": -1}],
)
def test_lengths_that_do_not_fit_are_refused(options: dict[str, int]) -> None:
    lengths = PromptLengths(context=302, head=5, question=6, query=11)  # block 0 has 101 tokens
    made = strategy("apb", **options)
    with pytest.raises(UserError) as caught:
        made.plan(lengths, 3, SHAPE, compressor("query"))
    ((name, value),) = options.items()
    assert caught.value.given == f"strategy.{name}={value}"
    assert name in caught.value.remedy


@pytest.mark.parametrize("options", [{"anchor_len": 11}, {"anchor_len": 107}, {"passing_len": 100}])
def test_lengths_at_the_limits_are_taken(options: dict[str, int]) -> None:
    lengths = PromptLengths(context=302, head=5, question=6, query=11)
    plan = strategy("apb", **options).plan(lengths, 3, SHAPE, compressor("query"))
    anchor, passing = options.get("anchor_len", 25), options.get("passing_len", 12)  # a quarter and an eighth of 100
    assert plan.anchor_len == anchor and [h.anchor_len for h in plan.host_plans[1:]] == [anchor, anchor]
    assert plan.kept_rows == (max(0, min(passing, 101 - anchor)), passing, 0)


def test_what_cannot_be_planned_is_refused() -> None:
    lengths = PromptLengths(context=7, head=1, question=1, query=3)
    for name in ("star", "apb"):
        for hosts in (0, -1, 8):
            with pytest.raises(UserError):
                strategy(name).plan(lengths, hosts, SHAPE, compressor("norm"))
    with pytest.raises(UserError, match="one host"):
        strategy("full").plan(lengths, 2, SHAPE)
    with pytest.raises(UserError, match="passing route"):
        strategy("apb", passing="rings").plan(lengths, 2, SHAPE, compressor("norm"))
    with pytest.raises(UserError, match="no option"):
        strategy("apb", ancor=3)
    with pytest.raises(UserError, match="unknown strategy"):
        strategy("abp")


@pytest.mark.parametrize(
    "options",
    [{"hosts": 0}, {"hosts": -1}, {"hosts": 2.5}, {"hosts": "4"}, {"threads": 0}, {"timeout_s": 0.0}],
    ids=str,
)
def test_numbers_out_of_range_are_refused_before_the_model_is_looked_for(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name} is out of range") as caught:
        Engine.launch("no-such-model", **options)
    assert caught.value.given == f"{name}={value}"


def test_a_setup_takes_no_options_that_it_has_settled() -> None:
    setup = tiny_engine(tiny_llama(torch.float32), strategy("apb"), 2, "norm").setup
    with pytest.raises(UserError, match="settled") as caught:
        Engine.launch(setup, hosts=4, dtype="float64")
    assert caught.value.given == "hosts, dtype"


@pytest.mark.parametrize("window", [0, 4, -1])
def test_a_window_without_a_middle_is_refused(window: int) -> None:
    with pytest.raises(UserError, match="must have a middle"):
        compressor("query", window=window)


def test_a_long_question_is_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(1)
    keys, asked = torch.randn(1, 2, 20, 8, generator=gen), torch.randn(1, 6, 50, 8, generator=gen)
    block = Candidates(0, 0, keys, keys, keys, 0.4, asked, None, 0, 0, lambda x, _: x)
    whole = compressor("query").score(block)
    monkeypatch.setattr("apb.compress.query._AT_ONCE", 3 * 20 * 7)  # seven question tokens, the last part has one
    torch.testing.assert_close(compressor("query").score(block), whole, atol=1e-7, rtol=1e-5)
    weights = (asked.unflatten(1, (2, 3)) @ keys[:, :, None].mT * 0.4).softmax(-1).mean(dim=(2, 3))
    pooled = torch.nn.functional.pad(weights, (2, 2)).unfold(-1, 5, 1).amax(-1)
    torch.testing.assert_close(whole, pooled, atol=1e-7, rtol=1e-5)


def test_ties_go_to_the_earlier_token_and_skipped_ones_are_never_kept() -> None:
    scores = torch.tensor([[[9.0, 1, 5, 5, 5, 2], [9, 9, 9, 9, 9, 9]]])
    assert top_rows(scores, 2, skip=1).tolist() == [[[2, 3], [1, 2]]]
    assert top_rows(scores, 4, skip=2).tolist() == [[[2, 3, 4, 5], [2, 3, 4, 5]]]
    assert scores[0, 0, 0] == 9  # the compressor's own scores stay as they are
    keys = torch.ones(1, 1, 300, 8)
    norms = compressor("norm").score(Candidates(0, 0, keys, keys, keys, 1.0, None, None, 0, 0, lambda x, _: x))
    assert top_rows(norms, 3, skip=0).tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("seed", [-1, 0, 123456789, 2**63])
def test_random_selection_takes_any_seed(seed: int) -> None:
    keys = torch.zeros(1, 2, 20, 8)
    blocks = [
        Candidates(layer, rank, keys, keys, keys, 1.0, None, None, 0, 0, lambda x, _: x)
        for layer in (0, 1)
        for rank in (0, 1)
    ]
    scores = [compressor("random", seed=seed).score(block) for block in blocks]
    again = compressor("random", seed=seed).score(blocks[0])
    assert torch.equal(again, scores[0])
    assert len({tuple(s.flatten().tolist()) for s in scores}) == 4  # another layer or host, other numbers
    assert scores[0].shape == (1, 2, 20) and not torch.equal(scores[0][0, 0], scores[0][0, 1])


# -- plans as data --------------------------------------------------------------------------------------


def _consistent(x: PromptLengths) -> PromptLengths:
    """Lengths that a prompt can have; a copy of the question, if there is one, lies within the first of 64 blocks."""
    copied = x.question + 2 if x.copied and x.question and x.head + x.question + 2 <= x.context // 64 else 0
    return dataclasses.replace(x, head=min(x.head, x.context), query=max(x.query, x.question), copied=copied)


LENGTHS = st.builds(
    PromptLengths,
    context=st.integers(1, 5000),
    head=st.integers(0, 60),
    question=st.integers(0, 80),
    query=st.integers(0, 120),
    copied=st.sampled_from([0, 1]),  # whether there is a copy
).map(_consistent)
STRATEGIES = st.sampled_from([strategy("star"), strategy("apb"), strategy("apb", passing="allgather")])
SCORERS = st.sampled_from(["query", "norm"])


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, hosts=st.integers(1, 64), made=STRATEGIES, scorer=SCORERS)
def test_plans_hold_together(lengths: PromptLengths, hosts: int, made: Strategy, scorer: str) -> None:
    hosts = min(hosts, lengths.context)
    plan = made.plan(lengths, hosts, SHAPE, compressor(scorer))
    spans = [(h.start, h.stop) for h in plan.host_plans]
    assert spans[0][0] == 0 and spans[-1][1] == lengths.context
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    sizes_found = [stop - start for start, stop in spans]
    assert max(sizes_found) - min(sizes_found) <= 1 and sizes_found == sorted(sizes_found, reverse=True)
    assert plan.exact == (hosts == 1)
    for host, rows in zip(plan.host_plans, plan.kept_rows, strict=True):
        assert 0 <= rows <= host.block_len
        selects = [s for s in host.steps if isinstance(s, Select)]
        assert sum(s.rows for s in selects) == rows
        assert all(s.skip + s.rows <= host.block_len for s in selects)
        if host.rank:
            context_part = host.anchor_len - plan.question_len
            assert plan.anchor_skip <= context_part <= sizes_found[0]
            seen = plan.passing_rows(host.rank) + host.anchor_len
            attends = [s for s in host.steps if isinstance(s, Attend) and not s.causal]
            assert sum(s.pairs for s in attends) == host.block_len * seen
        else:
            assert all(s.keys == (s.queries,) for s in host.steps if isinstance(s, Attend))  # nothing but themselves
    e, layers = SHAPE.element_size, SHAPE.layers
    row = 2 * SHAPE.heads.kv_heads * SHAPE.heads.qk_dim * e
    for rank in range(hosts):
        if plan.route == "ring":
            rows = sum(plan.kept_rows[: rank + 1]) if rank < hosts - 1 else 0
        else:
            rows = plan.kept_rows[rank] * (hosts - 1)
        assert passing_bytes(plan, rank) == rows * row * layers
    m = lengths.query
    partial = m * SHAPE.heads.q_heads * (SHAPE.heads.qk_dim * e + 4)
    assert partial_bytes(plan, m) == (hosts - 1) * partial * layers
    assert bytes_by_kind(plan, m).get("passing", 0) == sum(passing_bytes(plan, r) for r in range(hosts))
    assert sum(h.block_len for h in plan.host_plans) == lengths.context


def test_equal_plans_have_equal_digests_and_others_do_not() -> None:
    lengths = PromptLengths(context=302, head=5, question=6, query=11)
    base = strategy("apb").plan(lengths, 3, SHAPE, compressor("query"))
    again = strategy("apb").plan(dataclasses.replace(lengths), 3, SHAPE, compressor("query"))
    assert base.digest == again.digest
    others = [
        strategy("star").plan(lengths, 3, SHAPE),
        strategy("apb").plan(lengths, 4, SHAPE, compressor("query")),
        strategy("apb").plan(lengths, 3, SHAPE, compressor("norm")),
        strategy("apb", passing="allgather").plan(lengths, 3, SHAPE, compressor("query")),
        strategy("apb", anchor_len=30).plan(lengths, 3, SHAPE, compressor("query")),
        strategy("apb", anchor="shared").plan(lengths, 3, SHAPE, compressor("query")),
        strategy("spava").plan(lengths, 3, SHAPE, compressor("query")),
        strategy("apb", passing_len=2).plan(lengths, 3, SHAPE, compressor("query")),
        strategy("apb").plan(lengths, 3, dataclasses.replace(SHAPE, element_size=2), compressor("query")),
        *(
            strategy("apb").plan(dataclasses.replace(lengths, **{f.name: 13}), 3, SHAPE, compressor("query"))
            for f in dataclasses.fields(lengths)
            if f.name != "context"
        ),
    ]
    assert len({base.digest, *(p.digest for p in others)}) == len(others) + 1
