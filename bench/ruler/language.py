"""Language modelling: the likelihood of what a long text goes on with, for its perplexity."""

from __future__ import annotations

import random
from dataclasses import dataclass

from bench.ruler.base import Ask, Encode, Room
from bench.tools.prose import prose

_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs for English on average


@dataclass(frozen=True)
class Continuation:
    """A stretch of prose; its last words stand as the question, and ``scored`` characters after them are scored."""

    question: int = 160  # characters
    scored: int = 480

    def make(self, encode: Encode, room: Room, rng: random.Random) -> tuple[list[int], Ask, Ask | None]:
        """Return document and what follows it; there is nothing to decode."""
        text = prose()
        extra = self.question + self.scored
        # The document ends where the question begins, whatever its length in characters.
        blank = Ask("", "", ("",))
        before = _CHARACTERS_PER_TOKEN * (room(blank) + 64)
        at = text.index(" ", rng.randrange(min(before, len(text) // 2), len(text) - 2 * extra))
        middle = text.index(" ", at + self.question)
        end = text.index(" ", middle + self.scored)
        ask = Ask(text[at:middle], "", (text[middle + 1 : end],), new_tokens=0)
        tokens = room(ask)
        document = encode(text[max(0, at - _CHARACTERS_PER_TOKEN * tokens) : at])
        return document[-tokens:], ask, None
