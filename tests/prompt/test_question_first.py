"""The question before the document as well: every strategy's anchors then hold a stretch of the context itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from apb.engine.requests import prefill_request
from apb.plan.shapes import PromptLengths
from apb.prompt.prompt import Prompt, Question, with_question_first
from apb.strategies import strategy
from burst.errors import UserError
from tests.plan.test_plans import SHAPE
from tests.support import tiny
from tests.support.tiny import byte_tokenizer, make_prompt, tiny_engine, tiny_llama
from tests.support.twin import twin

pytest_plugins = ("tests.support.command",)

FORMS: list[tuple[str, dict[str, Any], str | None]] = [
    ("apb", {}, "query"),
    ("apb", {}, "norm"),
    ("apb", {"anchor": "shared", "passing": "allgather"}, "query"),
    ("spava", {}, "query"),
    ("spava", {}, "norm"),
    ("star", {}, None),
]


def copied(context: int) -> Prompt:
    """A random prompt with its question in the context as well."""
    return with_question_first(byte_tokenizer(), make_prompt(context))


@pytest.mark.parametrize("hosts", [1, 3, 5, 8])
@pytest.mark.parametrize("name, options, scorer", FORMS, ids=str)
def test_strategies_equal_the_twin(name: str, options: dict[str, Any], scorer: str | None, hosts: int) -> None:
    adapter, prompt = tiny_llama(torch.float64), copied(331)
    want = twin(adapter, tiny.rotation(adapter), prompt, name, hosts, select=scorer)
    engine = tiny_engine(adapter, strategy(name, **options), hosts, scorer)
    engine.setup = dataclasses.replace(engine.setup, chunk_tokens=29 if hosts == 5 else None)
    handle = engine.prefill(prompt)
    assert (engine.logits(handle) - want.logits).abs().max() < 1e-9
    assert prompt.question is not None and handle.conditioned_on == prompt.question.ids
    plan = engine.setup.plan(prompt)
    if hosts > 1 and name != "star":
        assert (plan.anchor_len, plan.kept_rows[0]) == (want.sizes.anchor, want.sizes.rows[0])


@pytest.mark.parametrize("hosts", [2, 5])
def test_apb_that_passes_everything_on_is_full_attention(hosts: int) -> None:
    """The question seen in anchors alone keeps ``apb`` from it: block 0 is blind, and l_q positions are not offered."""
    adapter = tiny_llama(torch.float64)
    everything = strategy("apb", passing_len=60)
    for prompt, equal in ((copied(60 * hosts - 6), True), (make_prompt(60 * hosts), False)):
        assert len(prompt.context_ids) == 60 * hosts
        full, apb = tiny_engine(adapter, strategy("full"), 1), tiny_engine(adapter, everything, hosts, "random")
        found = (apb.logits(apb.prefill(prompt)) - full.logits(full.prefill(prompt))).abs().max()
        assert (found < 1e-9) == equal


def test_the_anchor_is_the_contexts_beginning() -> None:
    prompt = copied(331)
    plan = strategy("apb").plan(prompt.lengths, 4, SHAPE)
    for rank in (1, 3):
        asked = prefill_request("h", prompt, plan, None, rank)
        assert asked.anchor_ids == prompt.context_ids[: plan.anchor_len]
    assert plan.anchor_skip == prompt.head and plan.anchor_len >= prompt.head + prompt.copied
    assert prompt.question is not None and prompt.copied == 6
    assert prompt.context_ids[5:11] == prompt.question.ids


@pytest.mark.parametrize("name", ["apb", "spava", "star"])
def test_a_copy_beyond_the_first_block_is_refused(name: str) -> None:
    lengths = PromptLengths(context=400, head=5, question=30, query=40, copied=32)
    fits, too_many = (5, 6) if name == "spava" else (10, 12)  # blocks of 40 and 34 tokens
    assert strategy(name).plan(lengths, fits, SHAPE).anchor_len == (40 if name == "star" else 37)
    with pytest.raises(UserError, match="is not within the first block"):
        strategy(name).plan(lengths, too_many, SHAPE)
    if name == "star":
        return
    with pytest.raises(UserError, match="anchor must hold 5 leading tokens and the question, 32 tokens"):
        strategy(name, anchor_len=36).plan(lengths, 2, SHAPE)


def test_what_has_no_question_or_a_copy_is_refused() -> None:
    closing = dataclasses.replace(make_prompt(50, before=0), chat=True)  # of a tool's result: the question came before
    chat = dataclasses.replace(make_prompt(50), chat=True)
    for prompt, tokenizer, says in (
        (make_prompt(50, question=0), byte_tokenizer(), "no question"),
        (copied(50), byte_tokenizer(), "has it there"),
        (closing, byte_tokenizer(), "nothing but the template's"),
        (chat, None, "read no text"),
    ):
        with pytest.raises(UserError, match="no question can be put before") as caught:
            with_question_first(tokenizer, prompt)
        assert says in str(caught.value.given)


@pytest.mark.parametrize("question", [None, Question((2, 3), (4, 5), (6,), None)], ids=["none", "another"])
def test_a_prompt_that_asks_something_else_is_refused(question: Question | None) -> None:
    engine = tiny_engine(tiny_llama(torch.float64), strategy("apb"), 3, "norm")
    with pytest.raises(UserError, match="another question stands before"):
        engine.prefill(dataclasses.replace(copied(90), question=question))


def test_a_prompt_can_be_given() -> None:
    engine = tiny_engine(tiny_llama(torch.float64), strategy("apb"), 3, "query")
    handle = engine.prefill(make_prompt(90), question_first=True)
    assert handle.prompt.token_ids == copied(90).token_ids and handle.prompt.copied == 6  # ids take no separator


def test_a_later_question_keeps_the_first_ones_copy() -> None:
    engine = tiny_engine(tiny_llama(torch.float64), strategy("apb"), 3, "query")
    handle = engine.prefill("a word " * 30, "which word?", chat=False, question_first=True)
    later = handle.fork("how many?")
    assert handle.conditioned_on == later.conditioned_on == "which word?"
    assert later.prompt.copied == handle.prompt.copied > 0
    assert later.prompt.context_ids == handle.prompt.context_ids


def test_ask_and_plan_take_it(ask: Any, apb: Any, model: Path, document: Path) -> None:
    asked = {first: ask(f"question_first={first}", "strategy=apb") for first in ("true", "false")}
    tokens = {first: ran.document["context_tokens"] for first, ran in asked.items()}
    assert tokens["true"] > tokens["false"]
    words = ("plan", f"model={model}", "cluster.hosts=2", "question_first=true")
    found = apb(*words, "context_tokens=300", "query_tokens=40").document
    assert found["context_tokens"] == 300 and found["plan"]["lengths"]["copied"] > 0
    found = apb(*words, "-d", str(document), "-q", "Who?").document
    assert found["plan"]["lengths"]["copied"] > found["plan"]["lengths"]["question"] > 0
