"""``apb bench NAME``: finds the benchmark and runs it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from burst.errors import UserError
from launch.terminal.arguments import Arguments
from launch.terminal.display import Display

BENCHES = {
    "attention": "bench.attention.show",
    "decode": "bench.decode.cli",
    "emulate": "bench.emulate.cli",
    "kernels": "bench.kernels.cli",
    "report": "bench.report.cli",
    "ruler": "bench.ruler.cli",
    "simulate": "bench.simulate.cli",
    "throughput": "bench.throughput.cli",
}


def main(arguments: Arguments, config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Run the benchmark that the configuration names. Raises UserError when it names none."""
    chosen = config.get("bench")
    if not chosen:
        raise UserError(
            "no benchmark named",
            given="apb bench",
            allowed=", ".join(BENCHES),
            remedy="Write 'apb bench ruler', for example.",
        )
    flags = ["-m"] if arguments.multirun else []
    words = [word for word in arguments.overrides if not word.startswith("out=")]  # where it is kept changes no number
    command = " ".join(["apb", "bench", *arguments.words[1:], *flags, *words])
    config = {**config, "command": command}
    document: dict[str, Any] = importlib.import_module(BENCHES[chosen["name"]]).run(config, display)
    return document
