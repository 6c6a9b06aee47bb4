"""Pictures of a results folder: a heat map of tasks by variants, and the frontier of likelihood over cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.tools.drawing import new_figure

Line = dict[str, Any]  # of summary.table


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Write heat map and frontier for every length, seed set and dtype that full attention was measured on; returns
    the files' names.

    Raises UserError without matplotlib.
    """
    new_figure()  # refuses at once where nothing can be drawn
    written = []
    lines = [line for line in lines if line["less_full"] is not None]
    kinds = [(line["tokens"], line["seeds"], line["dtype"]) for line in lines]
    for tokens, seeds, dtype in sorted(set(kinds)):
        here = [line for line, kind in zip(lines, kinds, strict=True) if kind == (tokens, seeds, dtype)]
        for name, paint in (("heatmap", _heat_map), ("frontier", _frontier)):
            figure = new_figure()
            paint(figure, here)
            figure.suptitle(f"{tokens} tokens, {seeds} seeds, {dtype}", fontsize=10)
            file = f"{name}-{tokens}-{seeds}-{dtype}.png"
            figure.savefig(folder / file, dpi=120)
            written.append(file)
    return written


def _heat_map(figure: Any, lines: Sequence[Line]) -> None:
    """Log-probability of the right answer, less full attention's on the same samples: red is worse, blue better."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    value = {(line["task"], line["variant"]): line["less_full"] for line in lines}
    grid = [[math.nan if value.get((t, v)) is None else value[t, v] for t in tasks] for v in variants]
    figure.set_size_inches(4 + 0.8 * len(tasks), 1.5 + 0.35 * len(variants))
    axes = figure.subplots()
    limit = max((abs(x) for row in grid for x in row if not math.isnan(x)), default=1.0) or 1.0
    image = axes.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(variants)), variants, fontsize=8)
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            axes.text(x, y, f"{cell:+.2f}" if not math.isnan(cell) else "", ha="center", va="center", fontsize=7)
    figure.colorbar(image, label="log p, less full's")


def _frontier(figure: Any, lines: Sequence[Line]) -> None:
    """The same difference, mean over tasks, against the busiest host's FLOPs and against the bytes of passing."""
    figure.set_size_inches(11, 4.5)
    left, right = figure.subplots(1, 2, sharey=True)
    frontier(left, lines)
    _scatter(right, lines, lambda line: line["passing_bytes"] / 1e6)
    right.set_xlabel("passed between hosts before the question, MB")
    right.legend(fontsize=6, loc="lower right")


def frontier(axes: Any, lines: Sequence[Line]) -> None:
    """Paint the difference over the busiest host's FLOPs, for the lines of one length and seed set."""
    _scatter(axes, lines, lambda line: line["flops_share"])
    axes.set_xscale("log")
    axes.set_xlabel("prefill FLOPs of the busiest host, share of full attention's")
    axes.set_ylabel("log-probability per answer token, less full's")


def comparable(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of the variants that were measured on all tasks: means over other tasks would not compare.

    Texts that are continued, which no question can stand before, are left out beside tasks that ask.
    """
    lines = [line for line in lines if line["perplexity"] is None] or lines
    tasks = {line["task"] for line in lines}
    seen = {variant: {x["task"] for x in lines if x["variant"] == variant} for variant in {x["variant"] for x in lines}}
    return [line for line in lines if seen[line["variant"]] == tasks]


def _scatter(axes: Any, lines: Sequence[Line], cost: Callable[[Line], float]) -> None:
    """One point a variant: means over all tasks."""
    lines = comparable(lines)
    for number, variant in enumerate(dict.fromkeys(line["variant"] for line in lines)):
        mine = [line for line in lines if line["variant"] == variant]
        y = fmean(line["less_full"] for line in mine)
        marker = "osD^v<>PX*"[number % 10]
        axes.plot(fmean(cost(line) for line in mine), y, marker=marker, linestyle="none", label=variant)
    axes.grid(alpha=0.3)
