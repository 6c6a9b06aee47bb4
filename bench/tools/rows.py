"""Rows of numbers in a file, one JSON line each: a run that was stopped goes on from its file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.tools.conditions import commit
from bench.tools.output import dated, say

Row = dict[str, Any]


class RowStore:
    """Rows by key, in a file or, without one, in memory; a row is on disk when ``add`` returns."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._rows: dict[str, Row] = {}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                whole, _, broken = file.read_text(encoding="utf-8").rpartition("\n")
                if broken:  # the run was killed while it wrote this line
                    file.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
                self._rows = {row["key"]: row for row in read(file)}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def under(self, prefix: str) -> list[Row]:
        """Return the rows whose key begins with ``prefix``."""
        return [row for row in self if row["key"].startswith(prefix)]

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row; one of the same key takes its place."""
        kept = {"key": key, **row}
        if self._rows.get(key) == kept:
            return
        self._rows[key] = kept
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(kept) + "\n")

    def sample(self, key: str, measure: Callable[[], Mapping[str, Any]]) -> Row:
        """Return the row of that key: the kept one, or ``measure()``, with its ``ok``, its seconds and commit."""
        if key not in self:
            start = time.perf_counter()
            row = measure()
            self.add(key, {**row, "seconds": round(time.perf_counter() - start, 2), "commit": commit()})
            shown = [f"{k}={v}" for k, v in row.items() if k != "ok" and not isinstance(v, list | dict)]
            say(f"{'ok  ' if row['ok'] else 'FAIL'} {key}  {'  '.join(shown)}")
        return self._rows[key]


def read(file: Path) -> Iterator[Row]:
    """Return the rows of a file, in order."""
    return (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line)


def keep(kind: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Add rows with their keys to ``bench/results/DATE-kind.jsonl``, which ``apb bench report`` reads."""
    kept = RowStore(dated(f"{kind}.jsonl"))
    for key, row in rows:
        kept.add(key, row)
