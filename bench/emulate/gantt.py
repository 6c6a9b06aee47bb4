"""Draws what every host of every strategy did when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.tools.drawing import new_figure
from burst.planner.events import Timeline


def draw(timelines: Mapping[str, Timeline], file: Path) -> list[str]:
    """Write one panel a strategy, hosts from top to bottom, and return the file's name; work is filled.

    Raises UserError without matplotlib.
    """
    figure = new_figure(10, 1 + sum(0.35 + 0.18 * len(t.ends) for t in timelines.values()))
    heights = [1 + len(t.ends) for t in timelines.values()]
    panels = figure.subplots(len(timelines), 1, squeeze=False, sharex=False, height_ratios=heights)
    for axes, (name, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
        for rank, spans in enumerate(timeline.spans):
            for what, colour in (("work", "tab:blue"), ("wait", "tab:red")):
                bars = [(s.start, s.stop - s.start) for s in spans if s.what == what and s.stop > s.start]
                axes.broken_barh(bars, (rank - 0.4, 0.8), color=colour, linewidth=0)
        axes.set_ylim(len(timeline.ends) - 0.5, -0.5)
        axes.set_ylabel(name, rotation=0, ha="right", fontsize=8)
        axes.set_yticks([])
        axes.set_xlim(0, timeline.total_s)
        axes.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel(
        "seconds, each panel its own; blue: own work, red: waiting (emulated, as ordered)", fontsize=8
    )
    figure.savefig(file, dpi=120)
    return [file.name]
