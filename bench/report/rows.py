"""The latest rows of every case in the results folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.ruler.summary import REPORT

Row = dict[str, Any]
KINDS = ("emulate", "simulate", "throughput", "decode")
# What decoders were compared under.
DECODING = ("model", "hardware", "dtype", "variant", "draft", "sampling", "new_tokens", "placement")


def read(folder: Path) -> dict[str, list[Row]]:
    """Return the rows of each kind, of every case the one written last; files go by their date.

    Those of ``ruler`` are lines of the newest summary: samples that nothing was chosen on and full attention answered.
    """
    found: dict[str, dict[str, Row]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for file in sorted(folder.glob(f"*-{kind}.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                case = _case(kind, row)
                found[kind].pop(case, None)
                found[kind][case] = row
    return {kind: list(rows.values()) for kind, rows in found.items()} | {"ruler": _ruler(folder)}


def _ruler(folder: Path) -> list[Row]:
    summaries = sorted(folder.glob("*-ruler/summary.json"))
    if not summaries:
        return []
    lines: list[Row] = json.loads(summaries[-1].read_text(encoding="utf-8"))["table"]
    return [line for line in lines if line["less_full"] is not None and line["seeds"] == REPORT]


def _case(kind: str, row: Row) -> str:
    """Return the key that rows of the same case share; a throughput row is one repetition of a case."""
    if kind == "throughput":
        return f"{row['hardware']}/{row['key']}"
    if kind == "decode":
        return "/".join(str(row[name]) for name in (*DECODING, "kind", "context", "number", "decoder"))
    shape = (row["configuration"]["model"]["name"], row["hardware"], row["tokens"], row["strategy"], row["hosts"])
    return "/".join(str(x) for x in (*shape, row["configuration"]["network"]["name"]))


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return rows by the values of some keys; a dot goes into a nested one."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(value(row, key) for key in keys), []).append(row)
    return found


def value(row: Row, key: str) -> Any:
    """Return a value by its dotted key; a list as a tuple."""
    at: Any = row
    for name in key.split("."):
        at = at[name]
    return tuple(at) if isinstance(at, list) else at
