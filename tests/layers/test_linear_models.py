"""Models with linear layers over hosts, beside what the matrix of families does: tiny chunks, strategies, graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from apb.decode import decoder
from apb.plan.bytes import bytes_by_kind
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from tests.support.families import VOCAB
from tests.support.matrix import LIMIT, adapter, wanted
from tests.support.tape import Tape
from tests.support.tiny import TinyEngine, random_ids, tiny_engine


def prompt(context: int, asked: int = 9) -> Prompt:
    """Return a random prompt whose question is ``asked`` tokens long; 0: none."""
    ids = random_ids(context + asked, 7, vocab=VOCAB)
    question = Question(ids[context : context + 1], ids[context + 1 : -2], ids[-2:], None)
    return Prompt(ids[:context], 3, question if asked else None)


def engine(family: str, hosts: int, name: str = "ring", chunk: int | None = None, **options: Any) -> TinyEngine:
    made = strategy(name, **options)
    e = tiny_engine(adapter(family, False), made, hosts, "norm" if name in ("apb", "spava") else None)
    e.setup = dataclasses.replace(e.setup, chunk_tokens=chunk)
    return e


@pytest.mark.parametrize("family", ("qwen3_5", "nemotron_h", "falcon_h1"))
@pytest.mark.parametrize("chunk", (1, 3))
def test_single_tokens_and_few_are_chunks(family: str, chunk: int) -> None:
    asked = prompt(23)
    for hosts in (1, 3):
        e = engine(family, hosts, "ring" if hosts > 1 else "full", chunk)
        error = float((e.prefill(asked).logits() - wanted(family, asked)).abs().max())
        assert error < LIMIT


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
