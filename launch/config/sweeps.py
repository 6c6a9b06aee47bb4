"""Sweeps: the runs that lists and ranges of values stand for."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException

from burst.errors import UserError
from launch.config.groups import GROUPS
from launch.config.schema import Schema
from launch.config.source import hydra
from launch.config.words import parse

MOST_RUNS = 256


def expand(schema: Schema, words: Sequence[str], folder: Path | None = None) -> list[list[str]]:
    """Return one list of words a run: the product of all sweeps (``a=1,2``, ``a=range(1,4)``), in order.

    Raises UserError for what Hydra's grammar does not take, for sweeps that cannot be listed, and for more than
    MOST_RUNS runs, before any of them is listed.
    """
    choices: list[list[str]] = []
    runs = 1
    taken = free_text(schema)
    with hydra(schema, folder) as loader:
        for word in words:
            key, equals, value = word.partition("=")
            if equals and key in taken:
                models = key == "model" and not os.path.isdir(value) and value.split(",")
                found = [f"model={m}" for m in models] if models else [word]
                runs = _counted(runs, len(found), word)
            else:
                override = parse(word, loader)
                sweeps = override.is_sweep_override()
                runs = _counted(runs, _count(override, word) if sweeps else 1, word)
                found = [f"{key}={text}" for text in _values(override, word)] if sweeps else [word]
            choices.append(found)
    return [list(run) for run in itertools.product(*choices)]


def free_text(schema: Schema) -> set[str]:
    """Return the keys that take free text or a path with any choice: Hydra's grammar would stumble over spaces,
    commas, '=' and letters beyond ASCII."""
    found = {key for name in [None, *schema.named] for key, each in schema.options(name).items() if each.text}
    for group in schema.groups():
        for name in GROUPS[group].names():
            found |= {f"{group}.{each.name}" for each in GROUPS[group].options(name) if each.text}
    return found | ({"model"} & set(schema.groups()))


def _counted(runs: int, values: float, word: str) -> int:
    if values <= 0:
        raise _unlisted(word, "there are none")
    if runs * values > MOST_RUNS:
        raise UserError(
            f"a sweep of more than {MOST_RUNS:,} runs",
            given=word,
            allowed=f"up to {MOST_RUNS:,} runs, all lists and ranges multiplied",
            remedy="Name fewer values, or run several sweeps.",
        )
    return runs * int(values)


def _count(override: Override, word: str) -> float:
    """Return how many values a sweep has, without listing a range; raises UserError for a range without an end."""
    values = override.value()
    if not isinstance(values, RangeSweep):
        return sum(1 for _ in _values(override, word))
    try:
        start, stop, step = (float(each or 0) for each in (values.start, values.stop, values.step))
        runs = (stop - start) / step
    except (ArithmeticError, ValueError, TypeError):
        runs = math.nan
    if math.isnan(runs):
        raise _unlisted(word, "a range has a start, a stop, and a step other than 0")
    return runs if math.isinf(runs) else max(0.0, math.ceil(runs))


def _values(override: Override, word: str) -> list[str]:
    try:
        return list(override.sweep_string_iterator())
    except (HydraException, ArithmeticError, ValueError, TypeError, OSError) as error:
        raise _unlisted(word, str(error)) from error


def _unlisted(word: str, reason: str) -> UserError:
    key = word.partition("=")[0]
    return UserError(
        f"the values of '{key}' cannot be listed: {reason}",
        given=word,
        allowed=f"a list ({key}=a,b) or a range ({key}=range(1,5))",
        remedy="Write the values out, with commas between them.",
    )
