"""``apb bench NAME``: the benchmarks by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from burst.errors import choose
from launch.arguments import Arguments
from launch.display import Display

BENCHES = {"ruler": "bench.ruler.cli:run"}


def main(arguments: Arguments, config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Run the benchmark that the configuration names and return its document."""
    module, _, function = BENCHES[choose("benchmark", config["bench"]["name"], BENCHES)].partition(":")
    result: dict[str, Any] = getattr(importlib.import_module(module), function)(config, display)
    return result
