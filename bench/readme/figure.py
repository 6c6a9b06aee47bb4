"""README's figure: what the rows have of speed-ups, where the time goes, growth with length and with hosts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apb.strategies import STRATEGIES
from bench.drawing import new_figure
from bench.emulate.measure import PARTS
from bench.readme.rows import Row, groups

COLOURS = {"linear": "tab:blue", "attention": "tab:orange", "selection": "tab:green", "other": "tab:gray"}


def draw(emulated: Sequence[Row], simulated: Sequence[Row], file: Path) -> bool:
    """Write the panels that there are rows for; False when there are none. Raises UserError without matplotlib."""
    panels: list[tuple[Any, Sequence[Row]]] = []
    if emulated:
        keys = ("configuration.model.name", "hardware", "tokens", "configuration.network.name")
        latest = list(groups(emulated, *keys).values())[-1]
        panels += [(_speed, latest), (_breakdown, latest)]
    for over, held in (("tokens", "hosts"), ("hosts", "tokens")):
        chosen = _series(simulated, over, held)
        if chosen:
            panels.append((partial(_lines, over=over, held=held), chosen))
    if not panels:
        return False
    figure = new_figure(4.2 * len(panels), 3.6)
    for axes, (paint, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        paint(axes, rows)
        axes.tick_params(labelsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return True


def _speed(axes: Any, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row["over_full"] is not None]
    middle = [row["over_full"]["median"] for row in rows]
    low = [row["over_full"]["median"] - row["over_full"]["iqr"][0] for row in rows]
    high = [row["over_full"]["iqr"][1] - row["over_full"]["median"] for row in rows]
    axes.bar(range(len(rows)), middle, yerr=[low, high], capsize=3, color="tab:blue")
    axes.set_xticks(range(len(rows)), [row["strategy"] for row in rows], rotation=40, ha="right")
    hosts = max(row["hosts"] for row in rows)
    what = f"{rows[0]['configuration']['model']['name']}, {rows[0]['tokens']:,} tokens, {hosts} hosts"
    axes.set_title(f"times faster than full on one host\n{what}, emulated", fontsize=8)


def _breakdown(axes: Any, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row["strategy"] != "full"]
    bottom = [0.0] * len(rows)
    for name in PARTS:
        heights = [row["slowest_host"][name] for row in rows]
        axes.bar(range(len(rows)), heights, bottom=bottom, label=name, color=COLOURS[name])
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    exposed = [row["exposed_s"]["median"] for row in rows]
    axes.bar(range(len(rows)), exposed, bottom=bottom, label="exposed communication", color="tab:red")
    axes.set_xticks(range(len(rows)), [row["strategy"] for row in rows], rotation=40, ha="right")
    axes.set_title("seconds of the slowest host\nby what they go to, emulated", fontsize=8)
    axes.legend(fontsize=6)


def _lines(axes: Any, rows: Sequence[Row], over: str, held: str) -> None:
    for (name,), mine in groups(rows, "strategy").items():
        points = sorted((row[over], row["worst_s"]) for row in mine)
        if len(points) > 1:
            axes.plot(
                *zip(*points, strict=True),
                marker=".",
                label=name,
                linewidth=1,
                color=f"C{list(STRATEGIES).index(name) % 10}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(over, fontsize=8)
    fixed = next(row[held] for row in rows if row["strategy"] != "full")
    model = rows[0]["configuration"]["model"]["name"]
    axes.set_title(f"seconds to the first token, {fixed:,} {held}\n{model}, simulated", fontsize=8)
    axes.legend(fontsize=6)


def _series(rows: Sequence[Row], over: str, held: str) -> list[Row]:
    """The rows of the newest model and rates, at the value of ``held`` that has the most values of ``over``."""
    able = [row for row in rows if "worst_s" in row]
    if not able:
        return []
    keys = ("configuration.model.name", "hardware", "configuration.network.name")
    latest = list(groups(able, *keys).values())[-1]
    parallel = [row for row in latest if row["strategy"] != "full"]
    by = groups(parallel, held)
    if not by:
        return []
    best = max(by, key=lambda key: (len({row[over] for row in by[key]}), key))
    if len({row[over] for row in by[best]}) < 2:
        return []
    full = [row for row in latest if row["strategy"] == "full"] if over == "tokens" else []
    return [*full, *by[best]]
