"""The benchmark ``simulate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmarks.base import BENCHMARKS
from launch.verbs.base import Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@BENCHMARKS.register(
    "simulate",
    "no device needed: plans, rates of kernels and a network; strategies side by side, and where one overtakes another",
)
class Simulate(Verb):
    """``apb bench simulate``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        from bench.settings import SimulateSettings

        return SimulateSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Measure and show."""
        from bench.simulate.cli import run

        return run(config.values, display)
