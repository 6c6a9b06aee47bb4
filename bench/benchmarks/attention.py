"""The benchmark ``attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmarks.base import BENCHMARKS
from launch.verbs.base import Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@BENCHMARKS.register(
    "attention",
    "exact attention over ranks, beside one dense call and public peers",
)
class Attention(Verb):
    """``apb bench attention``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        from bench.settings import AttentionOptions

        return AttentionOptions

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Measure and show."""
        from bench.attention.show import run

        return run(config.values, display)
