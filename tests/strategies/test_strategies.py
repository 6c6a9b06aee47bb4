"""Prefill strategies against their dense twin, and plans against the rules in words."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from apb.engine.engine import Engine
from apb.plan.bytes import bytes_by_kind
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape
from apb.plan.steps import Attend
from apb.strategies import strategy
from burst.errors import UserError
from tests.support import tiny
from tests.support.tiny import make_prompt, tiny_engine, tiny_llama
from tests.support.twin import Sizes, Twin, sizes, twin

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@functools.cache
def dense(
    dtype: torch.dtype,
    lengths: tuple[int, int, int],
    name: str,
    hosts: int,
    select: str | None,
    anchor_len: int | None,
    passing_len: int | None,
    published: bool = False,
) -> Twin:
    adapter = tiny_llama(dtype)
    context, head, question = lengths
    return twin(
        adapter,
        tiny.rotation(adapter),
        make_prompt(context, head, question),
        name,
        hosts,
        select=select,
        anchor_len=anchor_len,
        passing_len=passing_len,
        published=published,
    )


def check(
    name: str,
    hosts: int,
    select: str | None = None,
    *,
    lengths: tuple[int, int, int] = (997, 5, 6),
    dtype: torch.dtype = torch.float64,
    passing: str = "ring",
    anchor: str = "recomputed",
    published: bool = False,
    anchor_len: int | None = None,
    passing_len: int | None = None,
) -> Engine:
    """Prefill and ask on virtual hosts; logits, KV, plan and sent bytes are the twin's and the formulas'."""
    options: dict[str, Any] = {}
    if name in ("apb", "spava"):
        options = {"anchor_len": anchor_len, "passing_len": passing_len}
        options |= {"passing": passing, "anchor": anchor} if name == "apb" else {}
        options |= {"lengths": "published"} if published else {}
    if name == "spava":
        passing, anchor = "direct", "shared"
    made = strategy(name, **options)
    want = dense(dtype, lengths, name, hosts, select, anchor_len, passing_len, published)
    engine = tiny_engine(tiny_llama(dtype), made, hosts, select)
    prompt = make_prompt(*lengths)
    handle = engine.prefill(prompt)
    assert (engine.logits(handle) - want.logits).abs().max() < TOLERANCE[dtype]
    for rank in range(hosts):
        kept = tiny.shards(engine.cluster.host(rank)._caches[handle.id])
        for layer, kv in enumerate(kept):
            mine = torch.stack([kv.k_BKTD[0], kv.v_BKTE[0]])
            theirs = torch.stack([want.keys[layer], want.values[layer]])[:, :, want.rows[rank]]
            torch.testing.assert_close(mine, theirs, atol=TOLERANCE[dtype], rtol=0)
    plan = engine.setup.plan(prompt)
    shared = anchor == "shared" and hosts > 1
    check_sizes(plan, want.sizes, last_offers=passing == "allgather", shared=shared)
    m = len(prompt.question.query_ids) if prompt.question else 0
    sent = bytes_in_words(want.sizes, hosts, m, 0, 0, passing, plan.shape)
    if shared:
        asked = want.sizes.question if select == "query" and any(plan.kept_rows) else 0
        sent |= {"anchor": anchor_in_words(want.sizes, hosts, asked, plan.shape)}
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(plan, m) == sent
    assert handle.metrics["bytes_sent"] == sum(sent.values())
    return engine


def check_sizes(plan: PrefillPlan, want: Sizes, *, last_offers: bool, shared: bool) -> None:
    """The plan's lengths are those worked out from the rules in words."""
    hosts = plan.host_plans
    assert tuple(h.spans for h in hosts) == tuple(tuple(want.spans[n] for n in numbers) for numbers in want.held)
    if shared:  # one anchor in shares, one behind the other
        ends = [0, *itertools.accumulate(h.anchor_len for h in hosts)]
        assert [h.anchor_start for h in hosts] == ends[:-1] and ends[-1] == want.anchor
    else:
        assert tuple(h.anchor_len for h in hosts) == want.beside and not any(h.anchor_start for h in hosts)
    seen = {
        numbers[s.block]
        for numbers, h in zip(want.held, hosts, strict=True)
        for s in h.steps
        if isinstance(s, Attend) and s.queries == "block" and "anchor" in s.keys
    }
    assert seen == {n for n in range(1, len(want.spans)) if want.anchor}
    rows = want.rows if last_offers else (*want.rows[:-1], 0)  # nobody asks the last block for its rows
    assert plan.kept_rows == rows
    if plan.hosts > 1 and plan.strategy in ("apb", "spava"):
        assert (plan.anchor_len, plan.anchor_skip, plan.question_len) == (
            want.anchor,
            want.skip,
            want.question,
        )


def anchor_in_words(want: Sizes, hosts: int, asked: int, shape: ModelShape) -> int:
    """Every anchor token's K and V, and the queries of ``asked`` question tokens, to every other host."""
    heads = 2 * shape.heads.kv_heads * want.anchor + shape.heads.q_heads * asked
    return heads * shape.heads.qk_dim * shape.element_size * (hosts - 1) * shape.layers


def bytes_in_words(
    want: Sizes, hosts: int, query: int, decided: int, forwarded: int, passing: str, shape: ModelShape
) -> dict[str, int]:
    """What all hosts send: K and V rows of the passing, partial outputs, one hash and one word per peer."""
    e, layers = shape.element_size, shape.layers
    row = 2 * shape.heads.kv_heads * shape.heads.qk_dim * e
    if passing == "ring":  # host h hands its own and all earlier hosts' rows to h + 1, nothing wraps round
        rows = sum(sum(want.rows[: h + 1]) for h in range(hosts - 1))
    elif passing == "direct":  # a row goes once to every other host that holds a later block
        at = {n: h for h, numbers in enumerate(want.held) for n in numbers}
        needs = {(n, at[later]) for n in at for later in at if later > n and at[later] != at[n]}
        rows = sum(want.rows[n] for n, _ in needs)
    else:
        rows = sum(p * (hosts - 1) for p in want.rows) if hosts > 1 else 0
    lse = 8 if e == 8 else 4
    partial = (hosts - 1) * shape.heads.q_heads * (shape.heads.qk_dim * e + lse)
    sent = {
        "agree": hosts * (hosts - 1) * 32,
        "passing": rows * row * layers,
        "partials": hosts * (query + forwarded) * partial * layers,
        "token": 8 * decided * (hosts - 1),
    }
    return {kind: count for kind, count in sent.items() if count}


# -- against the twin -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", range(1, 9))
@pytest.mark.parametrize("name, select", [("star", None), ("apb", "query"), ("spava", "query")])
def test_every_host_count_equals_the_twin(name: str, select: str | None, hosts: int) -> None:
    check(name, hosts, select)


@pytest.mark.parametrize("passing", ["ring", "allgather"])
@pytest.mark.parametrize("hosts", [2, 5])
@pytest.mark.parametrize("select", ["query", "random", "recent", "norm"])
def test_every_compressor_and_route_equals_the_twin(select: str, hosts: int, passing: str) -> None:
    check("apb", hosts, select, passing=passing)


@pytest.mark.parametrize(
    "name, hosts, select", [("star", 3, None), ("apb", 8, "query"), ("apb", 7, "random"), ("spava", 7, "random")]
)
def test_a_longer_context_equals_the_twin(name: str, hosts: int, select: str | None) -> None:
    check(name, hosts, select, lengths=(2203, 5, 6))


@pytest.mark.parametrize(
    "name, hosts, select", [("full", 1, None), ("star", 4, None), ("apb", 4, "query"), ("spava", 4, "query")]
)
@pytest.mark.parametrize("context", [997, 2203])
def test_single_precision_equals_the_twin(context: int, name: str, hosts: int, select: str | None) -> None:
    check(name, hosts, select, lengths=(context, 5, 6), dtype=torch.float32)


@pytest.mark.parametrize("select", ["query", "random", "recent", "norm"])
@pytest.mark.parametrize(
    "lengths, hosts",
    [
        (
            (9, 5, 6),
            8,
        ),  # blocks of one token; the head is longer than block 0, the question longer than any block
        ((9, 0, 1), 8),
        ((8, 8, 1), 8),  # the head is all of the context
        ((30, 2, 40), 3),  # a question longer than a block
        ((30, 20, 4), 3),  # a head longer than block 0
        ((31, 3, 2), 2),
        ((3, 1, 1), 3),
        ((1, 0, 1), 1),
    ],
)
def test_short_contexts_equal_the_twin(lengths: tuple[int, int, int], hosts: int, select: str) -> None:
    check("apb", hosts, select, lengths=lengths)
    check("apb", hosts, select, lengths=lengths, passing="allgather")
    check("apb", hosts, select, lengths=lengths, anchor="shared")
    check("spava", hosts, select, lengths=lengths)
    check("star", hosts, lengths=lengths)


@pytest.mark.parametrize("select", ["query", "norm"])
@pytest.mark.parametrize("anchor_len, passing_len", [(11, 3), (40, 0), (None, 0), (None, 1), (None, 100), (106, 60)])
def test_explicit_lengths_equal_the_twin(select: str, anchor_len: int | None, passing_len: int | None) -> None:
    for passing in ("ring", "allgather"):
        check(
            "apb",
            3,
            select,
            lengths=(301, 5, 6),
            passing=passing,
            anchor_len=anchor_len,
            passing_len=passing_len,
        )
    lengths = (301, 5, 6)
    check("apb", 3, select, lengths=lengths, anchor="shared", anchor_len=anchor_len, passing_len=passing_len)
    if anchor_len != 106:  # beyond spava's block 0
        check("spava", 3, select, lengths=lengths, anchor_len=anchor_len, passing_len=passing_len)


def test_full_equals_the_model_itself() -> None:
    model = tiny.build(tiny.llama_config())
    prompt = make_prompt(997)
    ids = torch.tensor([prompt.token_ids])
    engine = tiny_engine(tiny_llama(torch.float32), strategy("full"), 1)
    handle = engine.prefill(prompt)
    assert handle.exact and handle.conditioned_on is None
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            want = model(ids).logits[0, -1]
        torch.testing.assert_close(engine.logits(handle), want, atol=1e-5, rtol=1e-5)
    got = engine.generate(handle, max_new_tokens=24).token_ids
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert list(got) == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("passing", ["ring", "allgather"])
def test_every_byte_of_prefill_query_and_decoding_is_in_the_formula(passing: str) -> None:
    engine = check("apb", 4, "query", passing=passing)
    prompt = make_prompt(997)
    plan, want = engine.setup.plan(prompt), sizes("apb", prompt, 4, select="query")
    handle = engine.prefill(prompt)
    m = len(prompt.question.query_ids) if prompt.question else 0
    result = engine.generate(handle, max_new_tokens=5)
    # Five tokens are decided, four of them went through the model again.
    expected = bytes_in_words(want, 4, m, 5, 4, passing, plan.shape)
    assert result.metrics["bytes_by_kind"] == bytes_by_kind(plan, m, 5, 4) == expected


@pytest.mark.parametrize("hosts, lengths", [(4, {"passing_len": 0}), (2, {"anchor_len": 100})])
def test_a_compressor_that_selects_nothing_needs_no_question(hosts: int, lengths: dict[str, int]) -> None:
    prompt = make_prompt(200, question=0)  # an anchor as long as block 0 leaves it nothing to offer
    handles = [
        tiny_engine(tiny_llama(torch.float64), strategy("apb", **lengths), hosts, select).prefill(prompt)
        for select in ("query", "norm")
    ]
    found = [h.fork(query=list(prompt.context_ids[:4])).logits() for h in handles]
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    with pytest.raises(UserError, match="needs a question"):
        tiny_engine(tiny_llama(torch.float64), strategy("apb", passing_len=1), 4, "query").prefill(prompt)


def test_without_a_question_only_the_prefill_is_sent() -> None:
    prompt = make_prompt(200, question=0)
    engine = tiny_engine(tiny_llama(torch.float32), strategy("apb"), 3, "norm")
    handle = engine.prefill(prompt)
    want = bytes_in_words(sizes("apb", prompt, 3, select="norm"), 3, 0, 0, 0, "ring", engine.setup.shape)
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(engine.setup.plan(prompt), 0) == want
    assert handle.conditioned_on is None and not handle.exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_follow_the_element_size(dtype: torch.dtype) -> None:
    prompt, adapter = make_prompt(200), tiny_llama(dtype)
    engine = tiny_engine(adapter, strategy("apb"), 3, "query")
    handle = engine.prefill(prompt)
    want = bytes_in_words(sizes("apb", prompt, 3, select="query"), 3, 11, 0, 0, "ring", adapter.shape)
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(engine.setup.plan(prompt), 11) == want
    assert engine.logits(handle).dtype == torch.float32
    exact = dense(torch.float32, (200, 5, 6), "apb", 3, "query", None, None).logits
    assert torch.nn.functional.cosine_similarity(engine.logits(handle), exact, dim=0) > 0.98
