"""The training of ``frequency``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.verbs.base import Verb
from launch.verbs.training.base import TRAININGS
from launch.verbs.training.settings import FrequencySettings

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@TRAININGS.register(
    "frequency",
    "a draft vocabulary: ids by how often they occur in a text, or in the answers that 'apb train eagle' keeps",
)
class Frequency(Verb):
    """``apb train frequency``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        return FrequencySettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Count the corpus."""
        from launch.verbs.training.jobs.frequency import run

        return run(arguments, config.values, display)
