"""Needles in a haystack: one or many keys, values and questions. Source: RULER (arXiv 2404.06654), section 3."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bench.ruler.base import Ask, Encode, Room, mix
from bench.ruler.text import essay, identifier, noise, number, word


@dataclass(frozen=True)
class Needles:
    """``keys`` needles' keys with ``values`` values each stand in ``hay``; ``queries`` of the keys are asked for.

    ``hay``: repeated noise, prose, or further needles of the same kind. The second question is for a key that the
    first one leaves out.
    """

    hay: Literal["noise", "essay", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def make(self, encode: Encode, room: Room, rng: random.Random) -> tuple[list[int], Ask, Ask | None]:
        """Return document, question and second question."""
        kind = self.value.removesuffix("s")
        found: dict[str, list[str]] = {}
        while len(found) < self.keys:
            found[self._key(rng)] = [self._value(rng) for _ in range(self.values)]
        asked = list(found)[: self.queries]
        ask = self._ask(kind, asked, found)
        rest = list(found)[self.queries :]
        second = self._ask(kind, rest[:1], found) if rest else None
        intro = encode(f"Some special magic {self.value} are hidden within the following text. Memorize them.\n")
        needles = [encode(self._line(k, v)) for k, values in found.items() for v in values]
        return mix(intro, needles, self._hay(encode, rng, set(found)), room(ask), rng), ask, second

    def _hay(self, encode: Encode, rng: random.Random, taken: set[str]) -> Iterator[list[int]]:
        if self.hay == "noise":
            yield from noise(encode)
        if self.hay == "essay":
            yield from essay(encode, rng)
        while True:
            key = self._key(rng)
            if key not in taken:
                yield encode(self._line(key, self._value(rng)))

    def _line(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}.\n"

    def _key(self, rng: random.Random) -> str:
        return identifier(rng) if self.key == "uuids" else word(rng)

    def _value(self, rng: random.Random) -> str:
        return identifier(rng) if self.value == "uuids" else number(rng)

    def _ask(self, kind: str, keys: list[str], found: dict[str, list[str]]) -> Ask:
        answers = tuple(v for k in keys for v in found[k])
        named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        new_tokens = 24 + (48 if self.value == "uuids" else 10) * len(answers)
        if len(answers) == 1:
            what, are = f"special magic {kind} for {named} mentioned in the provided text", "is"
            question = f"What is the {what}?"
        else:
            what, are = f"special magic {self.value} for {named} mentioned in the provided text", "are"
            question = f"What are all the {what}?"
        return Ask(question, f"The {what} {are}", answers, new_tokens=new_tokens)
