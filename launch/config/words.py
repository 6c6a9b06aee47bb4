"""Words ``key=value`` in Hydra's grammar."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from burst.errors import UserError

MOST_CHARACTERS = 10_000  # of a word in Hydra's grammar, whose parser is slow; free text has no limit


def parse(word: str, loader: Any = None) -> Override:
    """Return a word's meaning; raises UserError for what the grammar does not take, and for + and ~."""
    key, _, value = word.partition("=")
    if len(word) > MOST_CHARACTERS:
        raise UserError(
            f"the value of '{key[:80]}' is too long",
            given=f"{len(word):,} characters",
            allowed=f"up to {MOST_CHARACTERS:,} characters",
            remedy="Write less, or run several commands.",
        )
    try:
        (override,) = OverridesParser.create(loader).parse_overrides([word])
    except (HydraException, RecursionError, ArithmeticError, ValueError, TypeError) as error:
        raise UserError(
            f"the value of '{key}' cannot be read",
            given=word,
            allowed="numbers, true, false, null, plain words, lists [a,b], and anything in quotes",
            remedy=f"Put the value in quotes, the shell's and Hydra's: \"{key}='{value}'\".",
        ) from error
    if override.type is not OverrideType.CHANGE or override.package is not None:
        raise UserError(
            "settings are changed, never added or removed",
            given=word,
            allowed="key=value",
            remedy=f"Write {override.key_or_group}=VALUE.",
        )
    return override


def single(override: Override) -> Override:
    """Return a word's meaning; raises UserError where it stands for several values."""
    if override.is_sweep_override():
        raise UserError(
            f"'{override.key_or_group}' is given several values",
            given=override.input_line,
            allowed="one value, or a sweep with -m",
            remedy="Add -m to run them one after another.",
        )
    return override
