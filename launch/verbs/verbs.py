"""The command line's verbs: what each is called, what it takes, and where it lives."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from burst.errors import UserError
from launch.terminal.arguments import Arguments
from launch.terminal.display import Display

# A verb gets the arguments, one run's resolved configuration and the display, and returns the run's document.
Run = Callable[[Arguments, Mapping[str, Any], Display], dict[str, Any]]


@dataclass(frozen=True)
class Verb:
    """``target`` is "module:function", imported when used; ``name`` is what NAME stands for, if taken.

    NAME chooses from the verb's own group of settings.
    """

    summary: str
    target: str
    name: str | None = None
    document: bool = False  # whether it takes -d
    query: bool = False  # whether it takes -q
    sweeps: bool = True  # whether it takes -m
    gathers: bool = False  # whether all runs of a sweep work in one folder out=DIR, beside those of their own


VERBS = {
    "ask": Verb("ask a question about a long document", "launch.verbs.ask:run", document=True, query=True),
    "serve": Verb("answer OpenAI-style requests over HTTP", "launch.server:run", sweeps=False),
    "bench": Verb("measure fidelity or throughput", "bench.cli:main", name="NAME", gathers=True),
    "plan": Verb(
        "show blocks, bytes, FLOPs and memory before anything is loaded",
        "launch.verbs.plan:run",
        document=True,
        query=True,
    ),
    "train": Verb("train one of the small heads", "launch.verbs.train.train:run", name="NAME", document=True),
    "check": Verb("check this machine or cluster", "launch.check:run"),
}


def built(name: str) -> bool:
    """Whether verb ``name`` can be used in this version; imports nothing of it but its package."""
    return importlib.util.find_spec(VERBS[name].target.partition(":")[0]) is not None


def load(name: str) -> Run:
    """Return the function of verb ``name``; raises UserError when it is not built yet."""
    if not built(name):
        raise UserError(
            f"the verb '{name}' is not built yet",
            given=name,
            allowed=", ".join(verb for verb in VERBS if built(verb)),
            remedy="Use another verb, or a later version.",
        )
    module, _, attribute = VERBS[name].target.partition(":")
    function: Run = getattr(importlib.import_module(module), attribute)
    return function
