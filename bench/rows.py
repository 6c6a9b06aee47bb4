"""Measured rows, one JSON line each: what a killed run wrote is found again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.verify.runner import conditions


class Rows:
    """Rows by key, in a file or, without one, in memory; a row is on disk when ``add`` returns."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._rows: dict[str, dict[str, Any]] = {}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._read(file)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __iter__(self) -> Any:
        return iter(self._rows.values())

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row; one of the same key takes its place."""
        kept = {"key": key, **row}
        if self._rows.get(key) == kept:
            return
        self._rows[key] = kept
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(kept) + "\n")

    def _read(self, file: Path) -> None:
        if not file.exists():
            return
        text = file.read_text(encoding="utf-8")
        whole, _, broken = text.rpartition("\n")
        for line in whole.splitlines():
            row = json.loads(line)
            self._rows[row["key"]] = row
        if broken:  # the run was killed while it wrote this line
            file.write_text(f"{whole}\n" if whole else "", encoding="utf-8")


def provenance(config: Mapping[str, Any], hardware: str) -> dict[str, Any]:
    """Return what every row says of its origin: hardware, versions, commit, date, configuration, command."""
    settings = {key: value for key, value in config.items() if key not in ("command", "out")}
    return {"hardware": hardware, **conditions(), "command": config["command"], "configuration": settings}
