"""The benchmark ``report``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmarks.base import BENCHMARKS
from launch.verbs.base import Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@BENCHMARKS.register(
    "report",
    "figure and tables of README, from the dated rows in bench/results",
)
class Report(Verb):
    """``apb bench report``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        from bench.settings import ReportSettings

        return ReportSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Measure and show."""
        from bench.report.cli import run

        return run(config.values, display)
