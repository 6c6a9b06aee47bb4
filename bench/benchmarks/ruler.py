"""The benchmark ``ruler``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmarks.base import BENCHMARKS
from launch.verbs.base import Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@BENCHMARKS.register(
    "ruler",
    "fidelity on RULER's task families, beside full attention with the question last and first, and random passing",
)
class Ruler(Verb):
    """``apb bench ruler``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        from bench.settings import RulerSettings

        return RulerSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Measure and show."""
        from bench.ruler.cli import run

        return run(config.values, display)
