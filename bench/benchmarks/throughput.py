"""The benchmark ``throughput``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmarks.base import BENCHMARKS
from launch.verbs.base import Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@BENCHMARKS.register(
    "throughput",
    "time to first token in its parts, prefill and decode rates, memory and bytes: one strategy, length and "
    "host count a run",
)
class Throughput(Verb):
    """``apb bench throughput``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        from bench.settings import ThroughputSettings

        return ThroughputSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Measure and show."""
        from bench.throughput.cli import run

        return run(config.values, display)
