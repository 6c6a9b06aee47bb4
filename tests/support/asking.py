"""What the tests of answers share: a tiny model, prompts with a question, and engines over it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from apb.models.adapter import Adapter
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from tests.support import tiny
from tests.support.tiny import TinyEngine, byte_tokenizer, tiny_engine

HOSTS = 4
VOCAB = len(byte_tokenizer())
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "seed": 7}


@functools.cache
def model(dtype: torch.dtype = torch.float32) -> Adapter:
    """Return a model whose every token the tokenizer knows."""
    return tiny.adapt(tiny.llama_config(vocab_size=VOCAB, max_position_embeddings=400), dtype)


def ids(count: int, seed: int) -> tuple[int, ...]:
    """Return that many token ids, some of them alike."""
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, VOCAB, (count,), generator=gen).tolist())


def prompt(question: bool = True, context: int = 150) -> Prompt:
    """Return a random prompt."""
    asked = Question(ids(2, 1), ids(6, 2), ids(3, 3), None)
    return Prompt(ids(context, 4), 5, asked if question else None)


def engine(hosts: int = HOSTS, name: str = "apb", compress: str | None = "query", **options: Any) -> TinyEngine:
    """Return virtual hosts over the model."""
    made = strategy(name, **options)
    return tiny_engine(model(), made, hosts, None if name in ("star", "full") else compress)


def decoded(tokens: tuple[int, ...]) -> str:
    """Return tokens as text."""
    return byte_tokenizer().decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
