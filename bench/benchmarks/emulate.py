"""The benchmark ``emulate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmarks.base import BENCHMARKS
from launch.verbs.base import Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@BENCHMARKS.register(
    "emulate",
    "many hosts on one device: each one's work timed alone, put on a timeline with a network",
)
class Emulate(Verb):
    """``apb bench emulate``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        from bench.settings import EmulateSettings

        return EmulateSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Measure and show."""
        from bench.emulate.cli import run

        return run(config.values, display)
