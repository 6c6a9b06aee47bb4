"""RULER's task families, generated here with exact token budgets: ``apb bench ruler``. Source: arXiv 2404.06654."""

from __future__ import annotations

import importlib
import random
from typing import Any

from bench.ruler.base import Ask, Family, RulerSample, encoder
from bench.ruler.prompts import room
from burst.errors import choose

# name: (where its family lives, its difficulty); the names are RULER's where the task is
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "niah_single_1": ("needles:Needles", {"hay": "noise"}),
    "niah_single_2": ("needles:Needles", {"hay": "essay"}),
    "niah_single_3": ("needles:Needles", {"hay": "essay", "value": "uuids"}),
    "niah_multikey_1": ("needles:Needles", {"hay": "essay", "keys": 4}),
    "niah_multikey_2": ("needles:Needles", {"hay": "needles", "keys": 2}),
    "niah_multikey_3": ("needles:Needles", {"hay": "needles", "key": "uuids", "value": "uuids", "keys": 2}),
    "niah_multivalue": ("needles:Needles", {"hay": "essay", "values": 4}),
    "niah_multiquery": ("needles:Needles", {"hay": "essay", "keys": 5, "queries": 4}),
    "vt": ("tracking:Tracking", {}),
    "vt_1hop": ("tracking:Tracking", {"chains": 2, "hops": 1, "asked": "value", "letters": 3}),
    "cwe": ("counting:CommonWords", {}),
    "fwe": ("counting:FrequentWords", {}),
    "reading": ("reading:Reading", {}),
    "perplexity": ("language:Continuation", {}),
}


def family(task: str) -> Family:
    """Return the family of a task. Raises UserError for an unknown one."""
    target, options = TASKS[choose("task", task, TASKS)]
    module, _, name = target.partition(":")
    made: Family = getattr(importlib.import_module(f"bench.ruler.{module}"), name)(**options)
    return made


def sample(tokenizer: Any, task: str, tokens: int, seeds: str, index: int) -> RulerSample:
    """Return sample ``index`` of a seed set: its whole prompt, template and answer's beginning included, has exactly
    ``tokens`` tokens. Raises UserError when the task does not fit."""
    seed = f"{task}/{tokens}/{seeds}/{index}"
    chat = task != "perplexity"
    ids, ask, second = family(task).make(
        encoder(tokenizer), lambda ask: room(tokenizer, ask, tokens, chat=chat), random.Random(seed)
    )
    return RulerSample(task, seed, tuple(ids), ask, second, chat)


__all__ = ["TASKS", "Ask", "Family", "RulerSample", "family", "sample"]
