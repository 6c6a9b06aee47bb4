"""The training of ``retaining_heads``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.verbs.base import Verb
from launch.verbs.training.base import TRAININGS
from launch.verbs.training.settings import RetainingSettings

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@TRAININGS.register(
    "retaining_heads",
    "the heads of compress=retaining: prompts are labelled by the model, every layer is fitted, recall is measured",
)
class Retaining(Verb):
    """``apb train retaining_heads``."""

    def settings(self) -> type[Any]:
        """Return its settings."""
        return RetainingSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Train the heads."""
        from launch.verbs.training.jobs.retaining import run

        return run(arguments, config.values, display)
