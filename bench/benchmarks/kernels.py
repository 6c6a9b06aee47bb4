"""The benchmark ``kernels``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmarks.base import BENCHMARKS
from launch.verbs.base import Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@BENCHMARKS.register(
    "kernels",
    "attention, merge, selection, projections and LM head beside the device's roofline; writes the rates that simulate "
    "reads",
)
class Kernels(Verb):
    """``apb bench kernels``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        from bench.settings import KernelSettings

        return KernelSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Measure and show."""
        from bench.kernels.cli import run

        return run(config.values, display)
