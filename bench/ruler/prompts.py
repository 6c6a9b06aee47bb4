"""Prompts of samples: the question after the document, and for the fair baseline before it as well."""

from __future__ import annotations

import dataclasses
from typing import Any

from apb.prompt.prompt import Prompt, Question, make_prompt, make_question, with_question_first
from bench.ruler.base import Ask, RulerSample, encoder, too_short


def prompt(tokenizer: Any, sample: RulerSample, *, question_first: bool = False) -> Prompt:
    """Return a sample's prompt. ``question_first`` repeats the question between template head and document, where
    methods that show it early show it; the prompt is that much longer."""
    asked = question(tokenizer, sample.ask, chat=sample.chat)
    made = dataclasses.replace(make_prompt(tokenizer, sample.document, None, chat=sample.chat), question=asked)
    return with_question_first(tokenizer, made) if question_first else made


def question(tokenizer: Any, ask: Ask, *, chat: bool) -> Question:
    """Return what runs in the query phase: the question, the template's tail, the answer's beginning."""
    encode = encoder(tokenizer)
    text = ask.question if chat else tuple(encode(ask.question))  # plain text goes on without a separator
    made = make_question(tokenizer, text, chat=chat)
    prefix = tuple(encode(ask.prefix)) if ask.prefix else ()
    return dataclasses.replace(made, after=made.after + prefix)


def target(tokenizer: Any, ask: Ask) -> tuple[int, ...]:
    """Return the right answer's tokens, which follow the prompt."""
    return tuple(encoder(tokenizer)(ask.target))


def room(tokenizer: Any, ask: Ask, tokens: int, *, chat: bool) -> int:
    """Return how many tokens a document may have so that the prompt has ``tokens``. Raises UserError for none."""
    head = make_prompt(tokenizer, (0,), None, chat=chat).head
    asked = len(question(tokenizer, ask, chat=chat).query_ids) if ask.question else 0
    left = tokens - head - asked
    if left < 1:
        raise too_short(left, 1)
    return left
