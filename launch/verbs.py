"""The command line's verbs: what each is called, what it takes, and where it lives."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.arguments import Arguments
from launch.display import Display

# A verb gets the arguments, one run's resolved configuration and the display, and returns the run's document.
Run = Callable[[Arguments, Mapping[str, Any], Display], dict[str, Any]]


@dataclass(frozen=True)
class Verb:
    """``target`` is "module:function", imported when used; ``name`` is what NAME stands for, if taken.

    With ``names``, each NAME has a function of that name in ``target``'s module and its own root file, VERB_NAME.yaml.
    """

    summary: str
    target: str
    name: str | None = None
    names: tuple[str, ...] = ()
    document: bool = False  # whether it takes -d
    query: bool = False  # whether it takes -q
    sweeps: bool = True  # whether it takes -m


VERBS = {
    "ask": Verb("ask a question about a long document", "launch.ask:run", document=True, query=True),
    "serve": Verb("answer OpenAI-style requests over HTTP", "launch.server:run", sweeps=False),
    "bench": Verb("measure fidelity or throughput", "bench.cli:main", name="NAME"),
    "plan": Verb(
        "show blocks, bytes, FLOPs and memory before anything is loaded", "launch.plan:run", document=True, query=True
    ),
    "train": Verb(
        "train one of the small heads", "launch.train", name="NAME", names=("retaining_heads",), document=True
    ),
    "check": Verb("check this machine or cluster", "launch.check:run"),
}


def load(name: str) -> Run | None:
    """Return the function of verb ``name``, or None when it is not built yet."""
    module, _, attribute = VERBS[name].target.partition(":")
    try:
        function: Run = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module:  # it is built, and something that it needs is missing
            raise
        return None
    return function
