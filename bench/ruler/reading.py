"""Reading: made-up people, a paragraph each, and a question about one of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bench.ruler.base import Ask, Encode, Room, mix
from bench.ruler.text import ANIMALS, CITIES, FIRST, INSTRUMENTS, JOBS, LAST

_QUESTIONS = {
    "city": "In which city was {name} born?",
    "job": "What does {name} work as?",
    "animals": "Which animals does {name} keep?",
    "instrument": "Which instrument does {name} play?",
}


@dataclass(frozen=True)
class Reading:
    """Takes the place of RULER's question answering, whose documents would have to be downloaded.

    ``people`` of all in the text have a given place in it; the first is asked about, then the second.
    """

    people: int = 2

    def make(self, encode: Encode, room: Room, rng: random.Random) -> tuple[list[int], Ask, Ask | None]:
        """Return document, question and second question."""
        names = [f"{first} {last}" for first in FIRST for last in LAST]
        rng.shuffle(names)
        known = [_person(names.pop(), rng) for _ in range(self.people)]
        ask, second = (self._ask(person, rng) for person in known[:2])
        intro = encode("Read the following notes about people; a question about them follows.\n")
        planted = [encode(_paragraph(person, rng)) for person in known]
        return mix(intro, planted, self._others(encode, names, rng), room(ask), rng), ask, second

    def _others(self, encode: Encode, names: list[str], rng: random.Random) -> Iterator[list[int]]:
        while True:
            # After all names have been used the same ones come with a middle initial.
            name = names.pop() if names else f"{rng.choice(FIRST)} {rng.choice('ABCDEFGHIJKLMNOP')}. {rng.choice(LAST)}"
            yield encode(_paragraph(_person(name, rng), rng))

    def _ask(self, person: dict[str, str], rng: random.Random) -> Ask:
        what = rng.choice(sorted(_QUESTIONS))
        question = "Answer in a few words. " + _QUESTIONS[what].format(name=person["name"])
        return Ask(question, "Answer:", (person[what],), match="part", new_tokens=16)


def _person(name: str, rng: random.Random) -> dict[str, str]:
    return {
        "name": name,
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
        "animals": rng.choice(ANIMALS),
        "instrument": rng.choice(INSTRUMENTS),
    }


def _paragraph(person: dict[str, str], rng: random.Random) -> str:
    facts = [
        "{name} was born in {city}.",
        "{name} works as a {job}.",
        "At home {name} keeps {animals}.",
        "{name} plays the {instrument}.",
    ]
    rng.shuffle(facts)
    return " ".join(facts).format(**person) + "\n"
