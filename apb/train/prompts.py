"""Generated long-context prompts whose answers are known: what the labels of the small heads are taken from.

Families: needles (one of several keys, several values, several keys asked), variable tracking, records of people, and
reading in a text (which sentence follows). Documents are noise, generated sentences or windows of a text.
Source: the first two after RULER (arXiv 2404.06654), generated here. Its frequent words are left out: counting takes
all tokens alike, so which ones matter most cannot be learned.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from apb.prompt.prompt import Prompt, make_prompt
from apb.train.words import ADJECTIVES, CITIES, FIRST_NAMES, JOBS, LAST_NAMES, NOISE, NOUNS, VERBS
from burst.errors import UserError

HELD_OUT_SHARE = 0.1  # of the text, at its end: windows for held-out prompts never overlap those for training
LEAST_TEXT = 2000  # characters
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


@dataclass(frozen=True)
class LabelPrompt:
    """A prompt and the tokens that answer it; with gaps, its document is one block of a longer context whose other
    tokens are left out, ``before`` and ``behind`` it."""

    prompt: Prompt
    answer_ids: tuple[int, ...]
    family: str
    before: int = 0
    behind: int = 0


@dataclass(frozen=True)
class Material:
    """Ingredients of one prompt: ``rng`` decides everything, ``budget`` is the document's length in characters."""

    rng: random.Random
    budget: int
    text: str

    def filler(self) -> list[str]:
        """Return about ``budget`` characters of noise, generated sentences or a window of the text, as paragraphs."""
        kind = self.rng.choice(("noise", "sentences", "text", "text"))
        if kind == "text":
            return self.window()
        made: list[str] = []
        noise = self.rng.choice(NOISE)
        while sum(map(len, made)) < self.budget:
            made.append(noise if kind == "noise" else " ".join(self.sentence() for _ in range(4)))
        return made

    def window(self) -> list[str]:
        """Return about ``budget`` characters of the text, split into paragraphs; a short text is repeated."""
        start = self.rng.randrange(max(1, len(self.text) - self.budget))
        cut = (self.text[start:] + "\n\n" + self.text)[: self.budget]
        return [part for part in re.split(r"\n\s*\n", cut) if part.strip()]

    def sentence(self) -> str:
        """Return one plain sentence of random words."""
        r = self.rng
        who = r.choice(FIRST_NAMES) if r.random() < 0.5 else f"The {r.choice(ADJECTIVES)} {r.choice(NOUNS)}"
        verb, thing = r.choice(VERBS), f"{r.choice(ADJECTIVES)} {r.choice(NOUNS)}"
        return f"{who} {verb} the {thing} in {r.choice(CITIES)}."

    def spread(self, lines: Sequence[str]) -> str:
        """Return the filler with ``lines`` between its paragraphs, in their order."""
        parts = self.filler()
        places = sorted(self.rng.randrange(len(parts) + 1) for _ in lines)
        for place, line in reversed(list(zip(places, lines, strict=True))):
            parts.insert(place, line)
        return "\n".join(parts)

    def key(self) -> str:
        """Return a name for a needle."""
        r = self.rng
        return r.choice((f"{r.choice(ADJECTIVES)} {r.choice(NOUNS)}", r.choice(CITIES), r.choice(NOUNS)))

    def value(self) -> str:
        """Return a number or a word that cannot be guessed."""
        r = self.rng
        return r.choice((str(r.randrange(10**6, 10**7)), str(r.randrange(10**6, 10**7)), f"{r.choice(NOUNS)}"))


def _needles(m: Material) -> tuple[str, str, str]:
    keys = list(dict.fromkeys(m.key() for _ in range(m.rng.choice((1, 2, 4, 4, 8)))))
    noun = m.rng.choice(("number", "code", "secret", "password"))
    hidden = {key: [m.value() for _ in range(m.rng.choice((1, 1, 1, 3)))] for key in keys}
    lines = [f"One of the special magic {noun}s for {key} is: {value}." for key in keys for value in hidden[key]]
    m.rng.shuffle(lines)
    asked = m.rng.sample(keys, min(len(keys), m.rng.choice((1, 1, 2))))
    if len(asked) == 1 and len(hidden[asked[0]]) == 1:
        question = f"What is the special magic {noun} for {asked[0]} mentioned in the provided text?"
    else:
        question = f"What are all the special magic {noun}s for {' and '.join(asked)} mentioned in the provided text?"
    return m.spread(lines), question, ", ".join(value for key in asked for value in hidden[key]) + "."


def _tracking(m: Material) -> tuple[str, str, str]:
    chains, lines = m.rng.choice((1, 2, 3)), list[str]()
    names = ["".join(m.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=m.rng.choice((1, 3, 5)))) for _ in range(40)]
    names = list(dict.fromkeys(names))
    by_value: dict[str, list[str]] = {}
    order: list[list[str]] = []
    for _ in range(chains):
        value, hops = str(m.rng.randrange(10_000, 100_000)), m.rng.choice((1, 1, 2, 4))
        chain = [names.pop() for _ in range(hops + 1)]
        by_value[value] = chain
        order.append([f"VAR {chain[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(chain)])
    while any(order):  # each chain stays in order, chains interleave
        lines.append(m.rng.choice([chain for chain in order if chain]).pop(0))
    asked = m.rng.choice(list(by_value))
    if m.rng.random() < 0.5:
        name = by_value[asked][-1]
        return m.spread(lines), f"What is the value of VAR {name} in the text above?", f"{asked}."
    question = f"Find all variables that are assigned the value {asked} in the text above."
    return m.spread(lines), question, ", ".join(by_value[asked]) + "."


def _records(m: Material) -> tuple[str, str, str]:
    r, people = m.rng, dict[str, dict[str, str]]()
    lines: list[str] = []
    while sum(map(len, lines)) < m.budget:
        name = f"{r.choice(FIRST_NAMES)} {r.choice(LAST_NAMES)}"
        if name in people:
            continue
        facts = {
            "profession": r.choice(JOBS),
            "home town": r.choice(CITIES),
            "year of birth": str(r.randrange(1900, 2005)),
            "most treasured possession": f"{r.choice(ADJECTIVES)} {r.choice(NOUNS)}",
        }
        people[name] = facts
        lines.append(
            f"{name}, born in {facts['year of birth']}, lives in {facts['home town']} and works as a "
            f"{facts['profession']}. What {name.split()[0]} treasures most is a {facts['most treasured possession']}. "
            f"{m.sentence()}"
        )
    name = r.choice(list(people))
    what = r.choice(list(people[name]))
    return "\n".join(lines), f"What is the {what} of {name}?", f"{people[name][what]}."


def _reading(m: Material) -> tuple[str, str, str]:
    document = "\n\n".join(m.window())
    sentences = [" ".join(s.split()) for s in _SENTENCE.split(document)]
    pairs = [(a, b) for a, b in itertools.pairwise(sentences) if 20 < len(a) < 240 and 20 < len(b) < 240]
    if not pairs:
        return _records(m)
    first, second = m.rng.choice(pairs)
    return document, f'Which sentence follows this one in the text: "{first}"', second


FAMILIES: dict[str, Callable[[Material], tuple[str, str, str]]] = {
    "needles": _needles,
    "tracking": _tracking,
    "records": _records,
    "reading": _reading,
}
# Needles twice: their many forms need more prompts. An odd number of turns gives each family both kinds of anchor.
_TURNS = ("needles", "reading", "tracking", "needles", "records")
LEAST_GAP = 64  # tokens


class Prompts:
    """Prompts by number, the same for the same text, tokenizer and lengths; training and held-out ones share nothing.

    ``tokens``: shortest and longest document, in tokens (about: they are made from characters). ``reach``: positions
    that a prompt with gaps may take up; half of the training prompts have gaps, held-out ones never.
    Raises UserError for a text too short to draw from.
    """

    def __init__(self, tokenizer: Any, text: str, tokens: tuple[int, int], reach: int, seed: int) -> None:
        if len(text) < LEAST_TEXT:
            raise UserError(
                "the text is too short to draw documents from",
                given=f"{len(text)} characters",
                allowed=f"{LEAST_TEXT} characters or more",
                remedy="Give a longer text with -d, or leave -d out.",
            )
        at = round(len(text) * (1 - HELD_OUT_SHARE))
        self._texts = {False: text[:at], True: text[at:]}
        self._tokenizer, self._tokens, self._reach, self._seed = tokenizer, tokens, reach, seed
        probe = text[: 2 * LEAST_TEXT]
        self._chars_per_token = len(probe) / len(tokenizer(probe, add_special_tokens=False)["input_ids"])

    def sample(self, number: int, *, held_out: bool = False) -> LabelPrompt:
        """Return prompt ``number``; neighbouring numbers are of different families."""
        # Texts and numbers seed in different ways. Two numbers would not do: Random(2) and Random(2 + 2**32) are alike.
        rng = random.Random(f"held out {self._seed} {number}" if held_out else self._seed * (1 << 40) + number)
        shortest, longest = self._tokens
        tokens = round(shortest * (longest / shortest) ** rng.random())  # as many short as long ones, by factors
        family = _TURNS[number % len(_TURNS)]
        material = Material(rng, round(tokens * self._chars_per_token), self._texts[held_out])
        document, question, answer = FAMILIES[family](material)
        chat = bool(getattr(self._tokenizer, "chat_template", None))
        answer_ids = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        prompt = make_prompt(self._tokenizer, document, question, chat=chat)
        before = behind = 0
        room = self._reach - len(prompt.token_ids) - len(answer_ids)
        if not held_out and rng.random() < 0.5 and room > LEAST_GAP:
            gap = round(LEAST_GAP * (room / LEAST_GAP) ** rng.random())
            before = rng.randrange(gap + 1)
            behind = gap - before
        return LabelPrompt(prompt, tuple(answer_ids), family, before, behind)
