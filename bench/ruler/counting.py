"""Counting words: the common ones of a list, the frequent ones of a coded text. Source: RULER, section 3."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from bench.ruler.base import Ask, Encode, Room, mix, too_short
from bench.ruler.text import ADJECTIVES, NOUNS, letters, noise


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ``words`` words come ``often`` times each and all others ``seldom`` times.

    Where the list would not fit, the common words come less often: half of the room is theirs at most.
    """

    words: int = 10
    often: int = 30
    seldom: int = 3

    def make(self, encode: Encode, room: Room, rng: random.Random) -> tuple[list[int], Ask, Ask | None]:
        """Return document and question."""
        pool = _pool(rng)
        common = [next(pool) for _ in range(self.words)]
        ask = Ask(
            f"Question: What are the {self.words} most common words in the above list?",
            f"The {self.words} words that appear most often in the list are",
            tuple(common),
            new_tokens=8 * self.words,
        )
        intro = encode("Below is a numbered list of words. Some appear more often than others. Memorize those.\n")
        space = room(ask) - len(intro)
        each = len(encode(" 100. winter"))
        often = min(self.often, space // 2 // each // self.words)
        if often <= self.seldom:
            raise too_short(room(ask), len(intro) + 2 * each * self.words * (self.seldom + 1))
        entries = common * often
        # More others than fit, then fewer and fewer until the numbered list fits.
        others = [next(pool) for _ in range(max(0, 2 * space // each - len(entries)) // self.seldom)]
        while True:
            every = entries + others * self.seldom
            rng.shuffle(every)
            listed = [encode(f"{i}. {w} ") for i, w in enumerate(every, 1)]
            over = sum(map(len, listed)) - space
            if over <= 0:
                break
            if not others:
                raise too_short(room(ask), room(ask) + over)
            del others[: 1 + over // each // self.seldom]
        body = list(itertools.chain.from_iterable(listed))
        return mix([*intro, *body], [], noise(encode), room(ask), rng), ask, None


@dataclass(frozen=True)
class FrequentWords:
    """A text of made-up words whose frequencies fall as rank^-``alpha``; the most frequent one is dots, not asked."""

    alpha: float = 2.0
    asked: int = 3
    letters: int = 6

    def make(self, encode: Encode, room: Room, rng: random.Random) -> tuple[list[int], Ask, Ask | None]:
        """Return document and question."""
        coded = ["...."]
        while len(coded) < 60:
            name = letters(rng, self.letters, upper=False)
            if name not in coded:
                coded.append(name)
        top = coded[1 : self.asked + 1]
        ask = Ask(
            "Question: Ignoring the dots '....', what are the three most frequently appeared words in the above "
            "coded text?",
            "According to the coded text above, the three most frequently appeared words are",
            tuple(top),
            new_tokens=40,
        )
        intro = encode("Read the following coded text and track how often each coded word appears.\n")
        space = room(ask) - len(intro)
        pieces = [encode(f" {w}") for w in coded]
        shares = [(rank + 1) ** -self.alpha for rank in range(len(coded))]
        total = space / sum(s * len(p) for s, p in zip(shares, pieces, strict=True))
        counts = [int(s * total) for s in shares]
        if len({*counts[: self.asked + 2]}) < self.asked + 2:  # the asked ones must differ from each other and the next
            raise too_short(room(ask), 2 * room(ask))
        words = [p for p, count in zip(pieces, counts, strict=True) for _ in range(count)]
        words += [pieces[0]] * ((space - sum(map(len, words))) // len(pieces[0]))  # what rounding down has left
        rng.shuffle(words)
        body = list(itertools.chain.from_iterable(words))
        return mix([*intro, *body], [], itertools.repeat(pieces[0]), room(ask), rng), ask, None


def _pool(rng: random.Random) -> Iterator[str]:
    """Words without repetition: plain ones first, then pairs of them."""
    plain = sorted({*ADJECTIVES, *NOUNS})
    rng.shuffle(plain)
    yield from plain
    pairs = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    rng.shuffle(pairs)
    yield from pairs
