"""Models with linear layers over hosts: prefill, chunks, decoding, trees, forks and gathering, against whole runs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from apb.decode import decoder
from apb.models.adapter import Adapter
from apb.plan.bytes import bytes_by_kind
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from tests.support.families import VOCAB, adapt_family, build_family, whole_greedy, whole_logits
from tests.support.tape import Tape
from tests.support.tiny import TinyEngine, random_ids, tiny_engine

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "nemotron_h", "granitemoehybrid", "falcon_h1", "olmo_hybrid")
CLOSE = 1e-4


@functools.cache
def adapter(family: str) -> Adapter:
    return adapt_family(family)


def prompt(context: int, asked: int = 9) -> Prompt:
    """Return a random prompt whose question is ``asked`` tokens long; 0: none."""
    ids = random_ids(context + asked, 7, vocab=VOCAB)
    question = Question(ids[context : context + 1], ids[context + 1 : -2], ids[-2:], None)
    return Prompt(ids[:context], 3, question if asked else None)


def engine(family: str, hosts: int, name: str = "ring", chunk: int | None = None, **options: Any) -> TinyEngine:
    made = strategy(name, **options)
    e = tiny_engine(adapter(family), made, hosts, "norm" if name in ("apb", "spava") else None)
    e.setup = dataclasses.replace(e.setup, chunk_tokens=chunk)
    return e


@functools.cache
def logits_after(family: str, ids: tuple[int, ...]) -> torch.Tensor:
    return whole_logits(build_family(family), ids)[-1]


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hosts, layout, context", [(1, "zigzag", 61), (3, "zigzag", 133), (5, "contiguous", 14)])
def test_logits_tokens_and_bytes_are_those_of_the_whole_model(
    family: str, hosts: int, layout: str, context: int
) -> None:
    asked = prompt(context)
    e = engine(family, hosts, layout=layout)
    handle = e.prefill(asked)
    assert gap(handle.logits(), logits_after(family, asked.token_ids)) < CLOSE
    plan = e.setup.plan(asked)
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(plan, asked.lengths.query)
    assert e.generate(handle, max_new_tokens=8).token_ids == whole_greedy(build_family(family), asked.token_ids, 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", (1, 3, 64))
def test_chunks_are_the_whole(family: str, chunk: int) -> None:
    asked = prompt(75)
    for hosts in (1, 3):
        e = engine(family, hosts, "ring" if hosts > 1 else "full", chunk)
        assert gap(e.prefill(asked).logits(), logits_after(family, asked.token_ids)) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_forks_and_gathered_caches_go_on_as_the_whole_model(family: str) -> None:
    """Lookup drafts of a prompt that repeats itself; a second question; a cache on one host."""
    ids = random_ids(30, 8, vocab=VOCAB) * 3
    asked = Prompt(ids[:80], 3, Question(ids[80:81], ids[81:88], ids[88:], None))
    e = engine(family, 3)
    handle = e.prefill(asked)
    want = whole_greedy(build_family(family), asked.token_ids, 12)
    second = handle.fork(query=list(random_ids(5, 9, vocab=VOCAB)))
    gathered = handle.gather(1)
    made = decoder("lookup", tokens=6)
    got = e.generate(handle, 12, made)
    assert got.token_ids == want and got.metrics["accepted_length"] >= 1
    assert e.generate(gathered, 12, made).token_ids == want
    after = whole_greedy(build_family(family), second.token_ids, 6)
    assert e.generate(second, 6).token_ids == after
    again = handle.fork(query=list(second.prompt.question.query_ids)) if second.prompt.question else handle
    assert torch.equal(again.logits(), handle.fork(query=list(again.token_ids[80:])).logits())


@pytest.mark.parametrize("family", ("qwen3_5", "falcon_h1"))
@pytest.mark.parametrize("name, options", [("star", {}), ("apb", {"anchor": "shared"}), ("apb", {}), ("spava", {})])
def test_approximate_strategies_run_and_send_what_they_plan(family: str, name: str, options: dict[str, Any]) -> None:
    asked = prompt(120)
    e = engine(family, 3, name, **options)
    handle = e.prefill(asked)
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(e.setup.plan(asked), asked.lengths.query)
    whole = e.generate(handle, 4).token_ids
    chunked = engine(family, 3, name, 16, **options)
    assert chunked.generate(chunked.prefill(asked), 4).token_ids == whole


@pytest.mark.parametrize("family", ("qwen3_5", "falcon_h1"))
def test_steps_run_as_graphs(family: str) -> None:
    e, asked = engine(family, 2), prompt(40)
    handle = e.prefill(asked)
    made = decoder("lookup", tokens=6)
    want = [e.generate(handle.fork(), 8, each).token_ids for each in (decoder("autoregressive"), made)]
    tapes = [Tape() for _ in range(2)]
    for rank, tape in enumerate(tapes):
        e.cluster.host(rank).capture = tape  # type: ignore[attr-defined]
    got = [e.generate(handle.fork(), 8, each).token_ids for each in (decoder("autoregressive"), made)]
    assert got == want and min(tape.replays for tape in tapes) > 8
