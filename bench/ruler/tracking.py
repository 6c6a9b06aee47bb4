"""Variable tracking: which variables hold a value after chains of assignments. Source: RULER, section 3."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Literal

from bench.ruler.base import Ask, Encode, Room, mix
from bench.ruler.text import letters, noise


@dataclass(frozen=True)
class Tracking:
    """``chains`` of ``hops`` copies each, of variables with names of ``letters`` letters (RULER: 5), scattered over
    noise; the second question is for the second chain.

    ``asked``: which variables hold a value, as RULER asks, or which value the chain's last variable holds.
    """

    chains: int = 1
    hops: int = 4
    asked: Literal["names", "value"] = "names"
    letters: int = 5

    def make(self, encode: Encode, room: Room, rng: random.Random) -> tuple[list[int], Ask, Ask | None]:
        """Return document, question and second question."""
        length = self.hops + 1
        names: set[str] = set()
        while len(names) < self.chains * length:
            names.add(letters(rng, self.letters, upper=True))
        ordered = sorted(names)
        rng.shuffle(ordered)
        values = rng.sample(range(10_000, 100_000), self.chains)
        chains = [ordered[i * length : (i + 1) * length] for i in range(self.chains)]
        lines = [self._lines(chain, value) for chain, value in zip(chains, values, strict=True)]
        asks = [self._ask(chain, value) for chain, value in zip(chains, values, strict=True)]
        intro = encode("Memorize and track the chains of variable assignments hidden in the following text.\n")
        planted = [encode(f"{line}\n") for line in _interleaved(lines, rng)]
        document = mix(intro, planted, noise(encode), room(asks[0]), rng, shuffle=False)
        return document, asks[0], asks[1] if self.chains > 1 else None

    @staticmethod
    def _lines(chain: list[str], value: int) -> list[str]:
        copies = [f"VAR {later} = VAR {earlier}." for earlier, later in itertools.pairwise(chain)]
        return [f"VAR {chain[0]} = {value}.", *copies]

    def _ask(self, chain: list[str], value: int) -> Ask:
        if self.asked == "value":
            last = chain[-1]
            question = f"Question: What is the value of variable {last} in the text above?"
            return Ask(question, f"The value of variable {last} is", (str(value),), new_tokens=16)
        return Ask(
            f"Question: Find all variables that are assigned the value {value} in the text above.",
            f"According to the assignments in the text above, the variables that hold the value {value} are",
            tuple(chain),
            new_tokens=10 + 8 * len(chain),
        )


def _interleaved(lists: list[list[str]], rng: random.Random) -> list[str]:
    """Merge lists at random, each one's order kept: a variable is copied after it was set."""
    turns = [i for i, lines in enumerate(lists) for _ in lines]
    rng.shuffle(turns)
    rest = [iter(lines) for lines in lists]
    return [next(rest[i]) for i in turns]
