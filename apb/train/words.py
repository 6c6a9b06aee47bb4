"""Words that generated documents are made of."""

from __future__ import annotations

import re
from importlib import resources

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "It rained in the morning and cleared up by noon. Nobody was in a hurry.",
    "The train was late again. People read their papers and waited.",
    "Some days are long and some are short. Most are somewhere in between.",
)


def _lists() -> dict[str, tuple[str, ...]]:
    text = resources.files("apb.train").joinpath("words.txt").read_text(encoding="utf-8")
    return {name: tuple(words.split()) for name, words in re.findall(r"\[(\w+)\]([^\[]*)", text)}


_WORDS = _lists()
ADJECTIVES, NOUNS, VERBS = _WORDS["adjectives"], _WORDS["nouns"], _WORDS["verbs"]
FIRST_NAMES, LAST_NAMES = _WORDS["first_names"], _WORDS["last_names"]
CITIES, JOBS = _WORDS["cities"], _WORDS["jobs"]
