"""Haystacks of an exact token length with one needle in them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Quito", "Prague", "Hanoi", "Boston")


@dataclass(frozen=True)
class Haystack:
    """A document of token ids, a question about it, and the digits that answer it."""

    ids: tuple[int, ...]
    question: str
    answer: str
    depth: float  # share of the document that stands before the needle


def haystack(tokenizer: Any, tokens: int, depth: float, seed: int) -> Haystack:
    """Return a document of exactly ``tokens`` token ids: repeated noise with one 7-digit needle at ``depth``.

    Source: RULER (arXiv 2404.06654), single needle in noise.
    """
    rng = random.Random(seed)
    city, number = rng.choice(CITIES), str(rng.randrange(1_000_000, 10_000_000))
    needle = _encode(tokenizer, f"\nOne of the special magic numbers for {city} is: {number}.\n")
    line = _encode(tokenizer, f"{NOISE}\n")
    room = tokens - len(needle)
    noise = (line * (room // len(line) + 1))[:room]
    at = round(depth * room)
    at -= at % len(line)  # between two sentences, not inside one
    question = f"What is the special magic number for {city} mentioned in the provided text?"
    return Haystack(tuple(noise[:at] + needle + noise[at:]), question, number, depth)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
