"""The verb ``ask``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from launch.verbs.base import VERBS, Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@VERBS.register("ask", "ask a question about a long document")
class Ask(Verb):
    """``apb ask``."""

    document: ClassVar[bool] = True
    query: ClassVar[bool] = True
    examples: ClassVar[tuple[tuple[str, str], ...]] = (
        ("apb ask", "four hosts on this machine, a built-in document"),
        ("apb ask cluster=virtual compare=true", "all hosts in one process, beside full attention"),
        ('apb ask -d report.txt -q "What was decided, and why?"', "your own document"),
        ("apb ask -m strategy=apb,star cluster.hosts=2,4", "four runs, one after another"),
    )

    def settings(self) -> type[Any]:
        """Return its settings."""
        from launch.config.settings import AskSettings

        return AskSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Answer the question."""
        from launch.verbs.prefill.ask import run

        return run(arguments, config.values, display)
