"""Findings: what was checked or measured once, with its limit, the rows it is from and their commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.report.tables import markdown

FILE = "findings.json"


def findings(folder: Path) -> list[str]:
    """Return the table of ``folder``/findings.json; its texts name values of the newest summary they are from.

    ``{twins[compared]}`` is that value of DATE-verify.json where the finding's ``rows`` are ``verify``.
    """
    file = folder / FILE
    if not file.exists():
        return []
    cells = []
    for each in json.loads(file.read_text(encoding="utf-8")):
        newest = _newest(folder, each["rows"])
        values = _values(newest)
        what, measured, limit, commit = (
            (each[key] or "").format(**values) for key in ("what", "measured", "limit", "commit")
        )
        source = ", ".join([*([f"`{newest.name}`"] if newest else []), *([commit] if commit else [])])
        cells.append([what, measured, limit, source])
    return ["", *markdown(("what", "measured", "limit", "rows, commit"), cells)]


def _newest(folder: Path, name: str | None) -> Path | None:
    """The newest summary of that name, else file of rows, else folder."""
    if name is None:
        return None
    kinds = (sorted(folder.glob(f"????-??-??-{name}{ending}")) for ending in (".json", ".jsonl", ""))
    found = next(each for each in kinds if each)
    return found[-1]


def _values(file: Path | None) -> dict[str, Any]:
    """A summary's values; those of checks stand under ``results``."""
    if file is None or file.suffix != ".json":
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found.get("results", found)
