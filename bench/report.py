"""The only place in bench that prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, file=sys.stderr, flush=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Show rows in columns."""
    cells = [[str(x) for x in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    for row in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def document(result: dict[str, Any]) -> None:
    """Write the JSON document that ends standard output."""
    print(json.dumps(result), flush=True)
