"""Output of benchmarks: lines for people, documents, dated files. The only place in bench that prints."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, file=sys.stderr, flush=True)


def columns(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return headers and rows as lines of text in columns."""
    cells = [[str(x) for x in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def document(result: dict[str, Any]) -> None:
    """Write the JSON document that ends standard output."""
    print(json.dumps(result), flush=True)


def save(name: str, result: dict[str, Any]) -> Path:
    """Keep a result as ``bench/results/DATE-name.json`` and return the path."""
    path = dated(f"{name}.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def dated(name: str) -> Path:
    """Return the path of ``bench/results/DATE-name``."""
    return RESULTS / f"{time.strftime('%Y-%m-%d')}-{name}"
