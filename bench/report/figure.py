"""Figure of the rows: speed-ups, where the time goes, growth, drafts, and what speed costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apb.strategies import STRATEGIES
from bench.decode.cli import summary
from bench.decode.pictures import accepted
from bench.emulate.measure import PARTS
from bench.report.rows import DECODING, Row, groups
from bench.ruler.plots import comparable, frontier
from bench.tools.drawing import new_figure

WIDE = 4  # panels side by side at most
COLOURS = {
    "linear": "tab:blue",
    "attention": "tab:orange",
    "recurrence": "tab:purple",
    "selection": "tab:green",
    "other": "tab:gray",
}


def draw(found: Mapping[str, Sequence[Row]], file: Path) -> list[str]:
    """Write the panels that there are rows for and return what they show. Raises UserError without matplotlib."""
    panels: list[tuple[str, Any, Sequence[Row]]] = []
    if emulated := found["emulate"]:
        keys = ("configuration.model.name", "hardware", "tokens", "configuration.network.name")
        latest = list(groups(emulated, *keys).values())[-1]
        panels += [("speed-ups", _speed, latest), ("where the time goes", _breakdown, latest)]
    for over, held in (("tokens", "hosts"), ("hosts", "tokens")):
        chosen = _series(found["simulate"], over, held)
        if chosen:
            panels.append((f"time over {over}", partial(_lines, over=over, held=held), chosen))
    if found["decode"]:
        # The settings that were measured at most lengths; of those, the latest.
        lengths = [
            (len({row["context"] for row in mine}), mine) for mine in groups(found["decode"], *DECODING).values()
        ]
        panels.append(("accepted length", _accepted, max(reversed(lengths), key=lambda each: each[0])[1]))
    if found["ruler"]:
        panels.append(("log-probability against cost", _frontier, _longest(found["ruler"])))
    if not panels:
        return []
    down = -(-len(panels) // WIDE)
    across = -(-len(panels) // down)
    figure = new_figure(4.2 * across, 3.6 * down)
    places = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (_, paint, rows) in zip(places, panels, strict=False):
        paint(axes, rows)
        axes.tick_params(which="both", labelsize=7)
    for axes in places[len(panels) :]:
        axes.remove()
    file.parent.mkdir(parents=True, exist_ok=True)
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "apb"}):  # the same rows give the same file
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return [name for name, _, _ in panels]


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
        heights = [row["slowest_host"].get(name, 0.0) for row in rows]  # of rows before there were recurrences, none
        if not any(heights):
            continue
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


def _accepted(axes: Any, rows: Sequence[Row]) -> None:
    accepted(axes, summary(rows))
    axes.set_xlabel(axes.get_xlabel(), fontsize=8)
    axes.set_ylabel("tokens a step", fontsize=8)
    axes.set_title(f"accepted length, bonus token counted\n{rows[0]['model']}, {rows[0]['variant']}", fontsize=8)
    axes.legend(fontsize=6)


def _frontier(axes: Any, lines: Sequence[Row]) -> None:
    lines = comparable(lines)
    frontier(axes, lines)
    axes.set_xlabel("busiest host's FLOPs, share of full's", fontsize=8)
    axes.set_ylabel(axes.get_ylabel(), fontsize=7)
    tasks, samples = len({line["task"] for line in lines}), {line["samples"] for line in lines}
    each = "-".join(map(str, sorted({min(samples), max(samples)})))
    what = f"{lines[0]['model']}, {lines[0]['dtype']}, {lines[0]['tokens']:,} tokens, {tasks} task(s) of {each} samples"
    axes.set_title(f"log-probability of the right answer, over cost\n{what}", fontsize=8)
    axes.legend(fontsize=5)


def _longest(lines: Sequence[Row]) -> list[Row]:
    """The lines of the last model, at its greatest length, of the last dtype."""
    (*_, mine) = groups(lines, "model").values()
    longest = groups(mine, "tokens")[max(line["tokens"] for line in mine),]
    (*_, mine) = groups(longest, "dtype").values()
    return mine


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
