"""Pictures of ``apb bench decode``: accepted length by context, and tokens a second over links."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tools.drawing import new_figure

Line = dict[str, Any]


def draw(lines: Sequence[Line], regions: Sequence[Line], folder: Path) -> list[str]:
    """Write the pictures there are numbers for and return the files' names. Raises UserError without matplotlib."""
    figure = new_figure(7, 4)
    accepted(figure.subplots(), lines)
    figure.savefig(folder / "accepted.png", dpi=120)
    if not regions:
        return ["accepted.png"]
    contexts = list(dict.fromkeys(r["context"] for r in regions))
    figure = new_figure(4 * len(contexts), 4)
    for panel, context in zip(figure.subplots(1, len(contexts), squeeze=False)[0], contexts, strict=True):
        here = [r for r in regions if r["context"] == context]
        places = range(len(here))
        for shape in ("tree", "chain", "plain"):
            panel.plot(places, [r[f"{shape}_tokens_per_s"] for r in here], marker="o", label=shape)
        panel.set_xticks(places, [r["link"] for r in here], rotation=20, fontsize="small")
        panel.set(title=f"{context:,} tokens before the question", ylabel="tokens/s, modelled links", ylim=(0, None))
        panel.legend(fontsize="small")
    figure.savefig(folder / "trees-and-chains.png", dpi=120)
    return ["accepted.png", "trees-and-chains.png"]


def accepted(axes: Any, lines: Sequence[Line]) -> None:
    """Paint accepted length over context, all kinds of questions together."""
    every = [x for x in lines if x["kind"] == "all"]
    for name in dict.fromkeys(x["decoder"] for x in every):
        points = sorted((x["context"], x["accepted_length"]) for x in every if x["decoder"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xticks(sorted({x["context"] for x in every}))
    axes.set(xlabel="tokens before the question", ylabel="accepted length, bonus token counted", ylim=(0, None))
    axes.legend(fontsize="small")
