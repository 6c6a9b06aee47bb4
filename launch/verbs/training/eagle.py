"""The training of ``eagle``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.verbs.base import Verb
from launch.verbs.training.base import TRAININGS
from launch.verbs.training.settings import EagleSettings

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@TRAININGS.register(
    "eagle",
    "the draft head of decode=eagle2: the model answers questions, the head learns from its features, the walk "
    "is measured",
)
class Eagle(Verb):
    """``apb train eagle``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        return EagleSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Train the head."""
        from launch.verbs.training.jobs.eagle import run

        return run(arguments, config.values, display)
