"""The verb ``plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from launch.verbs.base import VERBS, Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@VERBS.register("plan", "show blocks, bytes, FLOPs and memory before anything is loaded")
class Plan(Verb):
    """``apb plan``."""

    document: ClassVar[bool] = True
    query: ClassVar[bool] = True
    examples: ClassVar[tuple[tuple[str, str], ...]] = (
        ("apb plan cluster.hosts=8 strategy=star", "the built-in document on eight hosts"),
        ("apb plan strategy=ring burst.explain=true", "and which exact schedule would be fastest"),
        ("apb plan model=org/name context_tokens=131072 memory_gb=80", "a length, for machines of 80 GB each"),
    )

    def settings(self) -> type[Any]:
        """Return its settings."""
        from launch.config.settings import PlanSettings

        return PlanSettings

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Show the plan."""
        from launch.verbs.prefill.plan import run

        return run(arguments, config.values, display)
