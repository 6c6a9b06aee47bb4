"""Exact strategies: full attention's logits, KV and tokens on any number of hosts, at the bytes of the plan."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.engine.engine import Engine
from apb.models.adapter import Adapter
from apb.plan.bytes import bytes_by_kind
from apb.plan.flops import prefill_flops
from apb.plan.plan import PrefillPlan
from apb.plan.report import plan_document
from apb.plan.shapes import PromptLengths
from apb.strategies import strategy
from burst.errors import UserError
from tests.plan.test_plans import SHAPE
from tests.support import tiny
from tests.support.tiny import make_prompt, tiny_engine, tiny_llama
from tests.support.twin import Twin, twin

EXACT = ("ring", "burst", "allgather", "ulysses", "usp")
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1), "odd": (6, 3)}


@functools.cache
def model(heads: str, dtype: torch.dtype) -> Adapter:
    q_heads, kv_heads = HEADS[heads]
    config = tiny.llama_config(hidden_size=16 * q_heads, num_attention_heads=q_heads, num_key_value_heads=kv_heads)
    return tiny.adapt(config, dtype)


@functools.cache
def dense(heads: str, dtype: torch.dtype, lengths: tuple[int, int, int]) -> Twin:
    adapter = model(heads, dtype)
    return twin(adapter, tiny.rotation(adapter), make_prompt(*lengths), "full", 1)


@functools.cache
def full_tokens(heads: str, dtype: torch.dtype, lengths: tuple[int, int, int]) -> tuple[int, ...]:
    engine = tiny_engine(model(heads, dtype), strategy("full"), 1)
    return engine.generate(engine.prefill(make_prompt(*lengths)), max_new_tokens=6).token_ids


def check(
    name: str,
    hosts: int,
    heads: str = "GQA",
    lengths: tuple[int, int, int] = (401, 5, 6),
    dtype: torch.dtype = torch.float32,
    nodes: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Engine, PrefillPlan]:
    """Prefill and ask on virtual hosts; logits, kept KV, tokens and bytes are those of full attention and the plan."""
    atol = 1e-4 if dtype == torch.float32 else 1e-9
    engine = tiny_engine(model(heads, dtype), strategy(name, **options), hosts, nodes=nodes)
    prompt, want = make_prompt(*lengths), dense(heads, dtype, lengths)
    plan = engine.setup.plan(prompt)
    handle = engine.prefill(prompt)
    assert handle.exact and handle.conditioned_on is None
    assert (engine.logits(handle) - want.logits).abs().max() < atol
    for rank, host in enumerate(plan.host_plans):
        rows = torch.cat([torch.arange(start, stop) for start, stop in host.spans])
        for layer, kv in enumerate(tiny.shards(engine.cluster.host(rank)._caches[handle.id])):
            torch.testing.assert_close(kv.k_BKTD[0], want.keys[layer][:, rows], atol=atol, rtol=0)
            torch.testing.assert_close(kv.v_BKTE[0], want.values[layer][:, rows], atol=atol, rtol=0)
    m = prompt.lengths.query
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(plan, m) == plan_document(plan)["bytes_by_kind"]
    gathered = handle.gather(hosts // 2)
    tokens = full_tokens(heads, dtype, lengths)
    result = engine.generate(handle, max_new_tokens=6)
    assert result.token_ids == tokens == engine.generate(gathered, max_new_tokens=6).token_ids
    assert result.metrics["bytes_by_kind"] == bytes_by_kind(plan, m, 6, 5)
    return engine, plan


@pytest.mark.parametrize("hosts", range(1, 9))
@pytest.mark.parametrize("name", EXACT)
def test_every_host_count_equals_full(name: str, hosts: int) -> None:
    check(name, hosts)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", EXACT)
def test_any_heads_equal_full(name: str, heads: str) -> None:
    for hosts in (3, 4):
        check(name, hosts, heads, (130, 5, 6), torch.float64)


@pytest.mark.parametrize("lengths, hosts", [((1, 0, 1), 1), ((3, 1, 1), 3), ((8, 8, 1), 8), ((9, 0, 40), 8)])
@pytest.mark.parametrize("name", EXACT)
def test_short_contexts_equal_full(name: str, lengths: tuple[int, int, int], hosts: int) -> None:
    for layout in ("zigzag", "contiguous"):
        check(name, hosts, "GQA", lengths, layout=layout)


@pytest.mark.parametrize("name", EXACT)
def test_other_layouts_and_machines_equal_full(name: str) -> None:
    other = "zigzag" if name == "ulysses" else "contiguous"
    check(name, 4, layout=other)
    check(name, 6, nodes=(0, 0, 0, 1, 1, 1))
    check(name, 5, nodes=(0, 0, 0, 1, 1))


@pytest.mark.parametrize("ulysses", [1, 2, 3, 6])
def test_any_head_group_equals_full(ulysses: int) -> None:
    check("usp", 6, ulysses=ulysses)


def test_bytes_in_words() -> None:
    rows, hosts, row, layers = 400, 4, 2 * 2 * 16 * 4, 3  # K and V of two heads of 16 fp32 numbers
    lengths = (rows, 5, 6)
    for name in ("ring", "burst", "allgather"):
        _, plan = check(name, hosts, lengths=lengths)  # every host needs every other one's rows
        assert bytes_by_kind(plan, 0)["kv"] == (hosts - 1) * rows * row * layers
        _, plan = check(name, hosts, lengths=lengths, layout="contiguous")  # only later hosts need a block
        assert bytes_by_kind(plan, 0)["kv"] == (3 + 2 + 1) * (rows // hosts) * row * layers
    # Four hosts have one query head each, and pairs of them share a kv head, which goes to both.
    head = 16 * 4 * layers
    _, plan = check("ulysses", hosts, lengths=lengths)
    assert bytes_by_kind(plan, 0)["qkv"] == rows * (hosts - 1) * 3 * head
    assert bytes_by_kind(plan, 0)["out"] == rows * (hosts - 1) * head
    _, plan = check("usp", hosts, lengths=lengths)  # pairs share heads; a ring of two pairs
    assert bytes_by_kind(plan, 0)["qkv"] == rows * (2 + 2) * head
    assert bytes_by_kind(plan, 0)["kv"] == hosts * rows // 2 * 2 * head


def test_a_ring_between_machines_sends_less_between_them() -> None:
    sent = {}
    for name in ("ring", "burst"):
        engine = tiny_engine(model("GQA", torch.float32), strategy(name), 8, nodes=(0, 0, 0, 0, 1, 1, 1, 1))
        engine.prefill(make_prompt(800, question=0))
        booked = [t.ledger.entries() for t in engine.cluster.world.transports]
        sent[name] = sum(entries.get(("kv", "inter"), 0) for entries in booked)
    # The ring crosses at two hosts, all seven blocks each; the double ring's eight hosts send one block across.
    assert sent["burst"] * 14 == sent["ring"] * 8


@pytest.mark.parametrize("name", ["ring", "ulysses"])
def test_positions_are_found_where_they_lie(name: str) -> None:
    engine = tiny_engine(tiny_llama(torch.float32), strategy(name, layout="zigzag"), 3)
    prompt = make_prompt(50)
    handle = engine.prefill(prompt)
    plan = engine.setup.plan(prompt)
    for host in plan.host_plans:
        held = [p for start, stop in host.spans for p in range(start, stop)]
        assert [handle.locate(p) for p in held] == [(host.rank, i) for i in range(len(held))]
    last = plan.host_plans[-1].block_len
    assert handle.locate(50) == (2, last) and handle.owner == 2
    gathered = handle.gather(1)
    assert [gathered.locate(p) for p in (0, 49, 50)] == [(1, 0), (1, 49), (1, 50)]


@pytest.mark.parametrize("name", EXACT)
def test_a_second_question_on_the_same_cache_equals_full(name: str) -> None:
    prompt, other = make_prompt(200), tiny.random_ids(7, 9)
    found = []
    for made, hosts in ((strategy("full"), 1), (strategy(name), 3)):
        engine = tiny_engine(tiny_llama(torch.float64), made, hosts)
        fork = engine.prefill(prompt).fork(query=other)
        found.append((engine.logits(fork), engine.generate(fork, max_new_tokens=6).token_ids))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-9 and found[0][1] == found[1][1]


# -- plans as data --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    context=st.integers(1, 3000), hosts=st.integers(1, 12), name=st.sampled_from(EXACT), layout=st.sampled_from("cz")
)
def test_plans_hold_together(context: int, hosts: int, name: str, layout: str) -> None:
    hosts = min(hosts, context)
    made = strategy(name, layout={"c": "contiguous", "z": "zigzag"}[layout])
    plan = made.plan(PromptLengths(context, 0, 0, 0), hosts, SHAPE)
    spans = sorted(span for host in plan.host_plans for span in host.spans)
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == context
    lengths = [host.block_len for host in plan.host_plans]
    assert max(lengths) - min(lengths) <= 1
    assert plan.spread is not None
    like = SHAPE.heads.attention_shape(SHAPE.element_size)
    computed = [plan.spread.head_pairs(rank, like) for rank in range(hosts)]
    assert sum(computed) == SHAPE.heads.q_heads * context * (context + 1) // 2
    full = strategy("full").plan(PromptLengths(context, 0, 0, 0), 1, SHAPE)
    assert sum(prefill_flops(plan, r) for r in range(hosts)) == prefill_flops(full, 0)
    if layout == "z" and context % (2 * hosts) == 0 and name in ("ring", "burst", "allgather"):
        assert max(computed) == min(computed)
    assert sum(length for _, length in plan.blocks) == context


def test_what_cannot_be_planned_is_refused() -> None:
    lengths = PromptLengths(context=7, head=1, question=1, query=3)
    for name in EXACT:
        with pytest.raises(UserError, match="more hosts"):
            strategy(name).plan(lengths, 8, SHAPE)
        with pytest.raises(UserError, match="layout"):
            strategy(name, layout="striped").plan(lengths, 2, SHAPE)
    with pytest.raises(UserError, match="head groups"):
        strategy("usp", ulysses=3).plan(lengths, 4, SHAPE)
