"""Runs checks one sample at a time, appends each result to a JSONL file, and skips what is there already."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from apb.engine.engine import versions
from bench.report import say

Measure = Callable[[], dict[str, Any]]  # must contain "ok": bool


@dataclass
class Recorder:
    """Keeps one run's samples in ``path``; a second run with the same file goes on where the first one stopped."""

    path: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            rows = (json.loads(line) for line in self.path.read_text().splitlines() if line)
            self.done = {row["key"]: row for row in rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def sample(self, key: str, measure: Measure) -> dict[str, Any]:
        """Return the row of that key: from the file, or measured now and appended."""
        if key in self.done:
            return self.done[key]
        start = time.perf_counter()
        row = {"key": key} | measure() | {"seconds": round(time.perf_counter() - start, 2), "commit": commit()}
        self.done[key] = row
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")
        say(f"{'ok  ' if row['ok'] else 'FAIL'} {key}  {_short(row)}")
        return row

    def rows(self, prefix: str) -> Iterator[dict[str, Any]]:
        """Return the rows whose key begins with ``prefix``."""
        return (row for key, row in self.done.items() if key.startswith(prefix))


def conditions() -> dict[str, Any]:
    """Return what a number depends on: machine, versions, commit."""
    return {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """Name this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


@cache
def commit() -> str:
    """Return the commit that is measured, with ``-dirty`` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _short(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{k}={v}" for k, v in row.items() if k not in ("key", "ok", "commit") and not isinstance(v, list | dict)
    )
