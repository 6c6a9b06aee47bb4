"""Fields of a settings dataclass that choose from a group of the configuration, such as ``strategy=apb``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A choice as declared: the group, the name taken by default (None: none), and a note on that."""

    group: str
    default: str | None
    note: str


def choice(group: str, default: str | None, note: str = "") -> Any:
    """Declare a field that chooses from ``group``; null can be chosen where ``default`` is None."""
    return dataclasses.field(default=default, metadata={"choice": group, "note": note})


def choices(kind: type[Any]) -> list[Choice]:
    """Return the choices of a dataclass in the order of their declaration."""
    fields = [field for field in dataclasses.fields(kind) if "choice" in field.metadata]
    return [Choice(f.metadata["choice"], f.default, f.metadata["note"]) for f in fields]  # type: ignore[arg-type]
