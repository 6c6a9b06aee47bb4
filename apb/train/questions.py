"""Questions that the frozen model is asked, and partly invents itself, so that its answers can be learned from.

Kinds: general, math, code, and text: a passage with something to do with it. A template that ends with "..." is only
the beginning of a question: the model, in the user's place, says how it goes on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from apb.train import words

KINDS = ("general", "math", "code")
_HELD_TEMPLATES, _HELD_WORDS = 6, 8  # one in so many belongs to the held-out questions
_HELD_TEXT = 0.1  # of the text, at its end
_FREE = 0.25  # of the general questions: the model invents all of them
_OPEN = "..."
_PASSAGE = (300, 1200)  # characters
_PASSAGE_TASKS = (
    "Summarize this text.",
    "What is this text about?",
    "Explain this text in simple words.",
    "List the most important points of this text.",
    "Write a question about this text and answer it.",
    "Continue this text.",
)


@dataclass(frozen=True)
class AskedQuestion:
    """``text`` as it is asked, or, when ``open``, as it begins."""

    kind: str
    text: str
    open: bool


def _sections() -> dict[str, list[str]]:
    text = resources.files("apb.train").joinpath("questions.txt").read_text(encoding="utf-8")
    found = re.findall(r"^\[(\w+)\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: body.strip().splitlines() for name, body in found}


_SECTIONS = _sections()
_SLOTS: Mapping[str, Sequence[str]] = {
    "topic": _SECTIONS["topics"][0].split("|"),
    "task": _SECTIONS["tasks"][0].split("|"),
    "structure": _SECTIONS["structures"][0].split("|"),
    "noun": words.NOUNS,
    "adjective": words.ADJECTIVES,
    "verb": words.VERBS,
    "name": words.FIRST_NAMES,
    "city": words.CITIES,
    "job": words.JOBS,
}


class Questions:
    """Questions by number, the same for the same text and seed.

    Held-out ones share no template, no word of a slot and no passage with the others.
    """

    def __init__(self, text: str, seed: int) -> None:
        at = round(len(text) * (1 - _HELD_TEXT))
        self._texts = {False: text[:at], True: text[at:]}
        self._seed = seed

    @property
    def text(self) -> str:
        """The part of the text that is trained on."""
        return self._texts[False]

    @property
    def held_out_text(self) -> str:
        """The part that is not."""
        return self._texts[True]

    def question(self, number: int, kind: str, *, held_out: bool = False) -> AskedQuestion:
        """Return question ``number`` of a kind."""
        rng = random.Random(f"{'held out' if held_out else 'train'} {self._seed} {kind} {number}")
        if kind == "text":
            return AskedQuestion(kind, f"{self._passage(rng, held_out)}\n\n{rng.choice(_PASSAGE_TASKS)}", open=False)
        if kind == "general" and not held_out and rng.random() < _FREE:
            return AskedQuestion(kind, "", open=True)
        template = rng.choice(_part(_SECTIONS[kind], _HELD_TEMPLATES, held_out))
        text = re.sub(r"{(\w+)}", lambda slot: _word(rng, slot[1], held_out), template)
        return AskedQuestion(kind, text.removesuffix(_OPEN).strip(), open=text.endswith(_OPEN))

    def free(self) -> list[AskedQuestion]:
        """Return questions written by hand, of no template; they are never trained on."""
        return [AskedQuestion("free", text, open=False) for text in _SECTIONS["free"]]

    def _passage(self, rng: random.Random, held_out: bool) -> str:
        text = self._texts[held_out]
        size = rng.randrange(*_PASSAGE)
        start = rng.randrange(max(1, len(text) - size))
        return text[start : start + size].partition(" ")[2].rpartition(" ")[0].strip() or text[start : start + size]


def _part(entries: Sequence[str], every: int, held_out: bool) -> Sequence[str]:
    return [entry for i, entry in enumerate(entries) if (i % every == every - 1) == held_out]


def _word(rng: random.Random, slot: str, held_out: bool) -> str:
    if slot in ("n", "m", "big"):
        low, high = {"n": (2, 20), "m": (20, 100), "big": (100, 1000)}[slot]
        return str(rng.randrange(low, high))
    word = rng.choice(_part(_SLOTS[slot.lower()], _HELD_WORDS, held_out))
    return word.capitalize() if slot[0].isupper() else word
