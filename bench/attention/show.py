"""``apb bench attention``: the table for people, the document, and the dated file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from bench.attention.case import AttentionSettings
from bench.attention.run import Row, rows
from bench.tools.conditions import conditions
from bench.tools.output import columns, save
from launch.config.typed import typed
from launch.terminal.display import Display, size

COLUMNS = ("", "ms", "% of ideal", "spread", "exposed ms", "% with comm.", "sent by all", "error")


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Measure, show and return the document. Raises UserError for settings that cannot be measured."""
    settings = typed(AttentionSettings, config["bench"], "bench.").checked()
    found = rows(settings, display.note)
    where = torch.cuda.get_device_name() if settings.device == "cuda" else "one thread; processor time"
    what = "forward and backward" if settings.backward else "forward"
    display.note(
        f"Causal attention, {what}, {settings.tokens:,} tokens on {settings.ranks} ranks, {settings.q_heads} over "
        f"{settings.kv_heads} heads of {settings.head_dim}, {settings.dtype}, {settings.layout}; {where}",
        style="bold",
    )
    display.note("\n".join(columns(COLUMNS, [_cells(row) for row in found if "not_run" not in row])))
    for row in found:
        if "not_run" in row:
            display.note(f"{row['name']}: not run: {row['not_run']}")
    display.note(
        "ms: the busiest rank's own work. exposed: modelled communication that no work hides, with the planner's "
        f"preset links for {settings.device}. error: largest relative RMS error against float64, "
        f"{min(settings.tokens, settings.error_tokens):,} tokens.",
        style="dim",
    )
    document = {"bench": "attention", "settings": asdict(settings), "rows": found, "conditions": conditions()}
    if settings.save:
        display.note(f"Kept as {save('attention', document)}")
    return document


def _cells(row: Row) -> list[str]:
    low, high = row.get("percent_of_ideal_spread", (None, None))
    return [
        row["name"],
        f"{1e3 * row['seconds']:.1f}",
        _number(row.get("percent_of_ideal"), 1),
        "" if low is None else f"{low:.1f}-{high:.1f}",
        _number(1e3 * row["modelled_exposed_s"], 2) if "modelled_exposed_s" in row else "",
        _number(row.get("percent_with_communication"), 1),
        size(row["sent_bytes"]) if "sent_bytes" in row else "",
        f"{row['error']:.1e}" if "error" in row else "",
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
