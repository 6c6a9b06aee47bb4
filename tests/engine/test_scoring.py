"""Given tokens scored over sharded and gathered caches."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from apb.models.adapter import Adapter
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from burst.errors import UserError
from tests.support import tiny
from tests.support.tiny import TinyEngine, byte_tokenizer, random_ids, tiny_engine
from tests.support.twin import twin

HOSTS = 3
GIVEN = random_ids(70, 9, vocab=250)  # longer than a chunk of the scorer


@functools.cache
def model() -> Adapter:
    """Return a model whose every token the tokenizer knows."""
    return tiny.adapt(tiny.llama_config(vocab_size=len(byte_tokenizer()), max_position_embeddings=240), torch.float32)


def prompt() -> Prompt:
    asked = Question(random_ids(2, 1, 250), random_ids(6, 2, 250), random_ids(3, 3, 250), None)
    return Prompt(random_ids(150, 4, 250), 5, asked)


def engine(name: str = "apb", hosts: int = HOSTS) -> TinyEngine:
    return tiny_engine(model(), strategy(name), hosts, "query" if name == "apb" else None)


def after(count: int) -> Prompt:
    """The prompt with the first given tokens after it."""
    p = prompt()
    assert p.question is not None
    return dataclasses.replace(p, question=dataclasses.replace(p.question, after=p.question.after + GIVEN[:count]))


@pytest.mark.parametrize("gathered", [False, True])
def test_scores_are_the_dense_twins(gathered: bool) -> None:
    e = engine()
    handle = e.prefill(prompt())
    if gathered:
        handle = handle.gather(1)
    score = handle.score(GIVEN, first=2)
    assert score.log_probs.shape == (70,) and score.first.shape == (2, len(byte_tokenizer()))
    for i in (0, 1, 63, 64, 69):  # at both sides of the chunk's border
        want = twin(model(), tiny.rotation(model()), after(i), "apb", HOSTS, select="query").logits.log_softmax(-1)
        torch.testing.assert_close(score.log_probs[i], want[GIVEN[i]], atol=1e-4, rtol=1e-4)
        if i < 2:
            torch.testing.assert_close(score.first[i], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(score.first.exp().sum(-1), torch.ones(2), atol=1e-5, rtol=0)


def test_scoring_leaves_the_cache_as_it_was() -> None:
    e = engine()
    scored, other = e.prefill(prompt()), e.prefill(prompt())
    scored.score(GIVEN)
    assert e.generate(scored, 5).token_ids == e.generate(other, 5).token_ids


def test_a_fork_runs_a_question_as_it_is() -> None:
    e = engine("full", hosts=1)
    asked = after(4).question
    forked = e.prefill(prompt()).fork(asked)
    torch.testing.assert_close(forked.logits(), e.prefill(after(4)).logits(), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_scored_is_refused() -> None:
    e = engine()
    handle = e.prefill(prompt())
    with pytest.raises(UserError, match="no tokens to score"):
        handle.score(())
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        handle.score((10**6,))
    with pytest.raises(UserError, match="longer than the model's context"):
        handle.score(GIVEN + GIVEN)
    e.generate(handle, 1)
    with pytest.raises(UserError, match="no logits are pending"):
        handle.score(GIVEN)
    with pytest.raises(UserError, match="no logits are pending"):
        bare = tiny_engine(model(), strategy("apb"), HOSTS, "norm")
        bare.prefill(dataclasses.replace(prompt(), question=None)).score(GIVEN)
