"""Prompts by their lengths alone, and the strategies to compare on them: what times and bytes are measured with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from apb.compress import Compressor
from apb.engine.setup import Setup
from apb.plan.shapes import PromptLengths
from apb.prompt.prompt import Prompt, Question
from apb.strategies import STRATEGIES
from burst.errors import UserError, choose

HEAD, BEFORE, AFTER = 24, 1, 7  # tokens of a chat template before the document, before and after the question


def lengths(tokens: int, query: int) -> PromptLengths:
    """Return the lengths of a prompt of ``tokens``, of which the question with its template takes ``query``.

    Raises UserError where that leaves no document or no question.
    """
    least = HEAD + query + 1
    if query <= BEFORE + AFTER or tokens < least:
        raise UserError(
            "the prompt has no room for template, document and question",
            given=f"{tokens} tokens, {query} of them for the question and its template",
            allowed=f"more than {BEFORE + AFTER} for the question, and {least} or more in all",
            remedy="Change bench.tokens or bench.query_tokens.",
        )
    return PromptLengths(tokens - query, HEAD, query - BEFORE - AFTER, query)


def random_prompt(of: PromptLengths, vocab: int) -> Prompt:
    """Return random token ids of those lengths, the same every time."""
    ids = torch.randint(vocab, (of.context + of.query,), generator=torch.Generator().manual_seed(0)).tolist()
    context, question = tuple(ids[: of.context]), tuple(ids[of.context :])
    asked = Question(question[:BEFORE], question[BEFORE:-AFTER], question[-AFTER:], None)
    return Prompt(context, of.head, asked)


def setups(base: Setup, names: Sequence[str], hosts: int, compress: Compressor | None) -> list[Setup]:
    """Return the strategies of those names on ``hosts`` hosts (full attention: one). Raises UserError."""
    found = []
    for name in names:
        choose("strategy", name, STRATEGIES)
        made = base.using(name, None if name == "full" else hosts)
        if made.compressor is not None and compress is not None:
            made = dataclasses.replace(made, compressor=compress)
        found.append(made)
    return found
