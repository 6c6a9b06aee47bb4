"""The benchmark ``decode``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.benchmarks.base import BENCHMARKS
from launch.verbs.base import Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@BENCHMARKS.register(
    "decode",
    "decoders side by side on the same caches: accepted length, draft and verify time, bytes; trees against chains",
)
class Decode(Verb):
    """``apb bench decode``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        from bench.settings import DecodeBench

        return DecodeBench

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Measure and show."""
        from bench.decode.cli import run

        return run(config.values, display)
