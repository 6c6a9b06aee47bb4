"""``apb bench report``: the figure and the tables of docs/results.md, from the dated rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report.figure import draw
from bench.report.findings import findings
from bench.report.rows import read
from bench.report.tables import decoders, emulated, growth, measured
from bench.settings import ReportSettings
from bench.tools import output
from bench.tools.setup import base_setup
from burst.errors import UserError, in_range
from launch.config.typed import typed
from launch.terminal.display import Display

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Write figure and tables where they are wanted, show the tables and return the document."""
    asked = typed(ReportSettings, config["bench"], "bench.")
    fine = bool(asked.growth_hosts) and min(asked.growth_hosts) >= 1
    in_range("bench.growth_hosts", list(asked.growth_hosts), fine, "a list of numbers, 1 or more")
    in_range("bench.growth_block", asked.growth_block, asked.growth_block >= 64, "64 or more")
    folder = Path(asked.results) if asked.results else output.RESULTS
    rows = read(folder)
    tables = {
        "Claims": findings(folder),
        "Emulated hosts": emulated(rows["emulate"]),
        "Measured hosts": measured(rows["throughput"]),
        "Decoders": decoders(rows["decode"]),
        "Growth": growth(base_setup(config, display), asked.growth_hosts, asked.growth_block),
    }
    lines = [line for title, table in tables.items() if table for line in ("", f"## {title}", *table)]
    panels = draw(rows, Path(asked.figure)) if asked.figure else []
    if asked.figure and panels:
        shown = os.path.relpath(asked.figure, Path(asked.readme).parent) if asked.readme else asked.figure
        lines = ["", f"![{', '.join(panels).capitalize()}]({shown})", *lines]
    text = "\n".join(lines).strip("\n")
    display.raw(text + "\n")
    if asked.readme:
        splice(Path(asked.readme), text)
    counts = {kind: len(found) for kind, found in rows.items()}
    return {"bench": "report", "rows": counts, "figure": asked.figure if panels else None, "text": text}


def splice(file: Path, text: str) -> None:
    """Put the text between the two marks of a file. Raises UserError where they are not."""
    try:
        before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}", given=str(file), allowed="a text file", remedy="Check the path."
        ) from error
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(
            "the file has no place for the results",
            given=str(file),
            allowed=f"a file with the lines {BEGIN} and {END}",
            remedy="Add the two lines where the tables are to stand.",
        )
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
