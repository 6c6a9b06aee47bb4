"""One way to make an implementation from its name and options, imported only when asked for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Collection, Iterable
from typing import Any

from burst.errors import UserError, choose


def build(kind: str, group: str, table: dict[str, str], name: str, options: dict[str, Any]) -> Any:
    """Import the dataclass behind ``table[name]`` ("module:Class") and make it with ``options``.

    ``kind`` is the word for people, ``group`` the configuration's. Raises UserError for unknown names and options.
    """
    module, _, attribute = table[choose(kind, name, table)].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    check_options(kind, group, name, options, [f.name for f in dataclasses.fields(cls)])
    return cls(**options)


def check_options(kind: str, group: str, name: str, options: Iterable[str], allowed: Collection[str]) -> None:
    """Raise UserError for the first of ``options`` that the implementation ``name`` does not know."""
    for option in options:
        if option not in allowed:
            raise UserError(
                f"{kind} '{name}' has no option '{option}'",
                given=option,
                allowed=", ".join(allowed) or "no options",
                remedy=f"Remove {group}.{option} or choose another {kind}.",
            )
