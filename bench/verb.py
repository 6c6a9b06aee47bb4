"""The verb ``bench``, which this project's own entry point gives to the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from burst.registry import Registry
from launch.verbs.base import VERBS, NamedVerb, Verb

if TYPE_CHECKING:
    from launch.config.schema import Configuration
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


@VERBS.register("bench", "measure fidelity or throughput")
class Bench(NamedVerb):
    """``apb bench NAME``."""

    gathers: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    examples: ClassVar[tuple[tuple[str, str], ...]] = (
        ("apb bench attention", "our schedules beside one dense call and public peers"),
        ("apb bench attention bench.tokens=32768 bench.ranks=8 bench.dtype=bfloat16", "another size"),
        ("apb bench ruler cluster.hosts=8 bench.tasks=[vt_1hop]", "one task, with its baselines"),
        ("apb bench decode bench.contexts=[0,4000] decode.tree=auto", "decoders, trees and chains side by side"),
        ("apb bench ruler -m compress=query,norm out=DIR", "two compressors; stopped runs go on"),
        ("apb bench experiment=headline", "the emulation behind README's table"),
    )

    @property
    def names(self) -> Registry[type[Verb]]:
        """The benchmarks by name."""
        from bench.benchmarks.base import BENCHMARKS

        return BENCHMARKS

    def settings(self) -> type[Any]:
        """Return what all benchmarks have."""
        from launch.config.settings import Kept

        return Kept

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Run the benchmark, which notes the command beside its numbers; raises UserError without a NAME."""
        flags = ["-m"] if arguments.multirun else []
        words = [
            word for word in arguments.overrides if not word.startswith("out=")
        ]  # where it is kept changes no number
        config.values["command"] = " ".join(["apb", "bench", *arguments.words[1:], *flags, *words])
        return super().run(arguments, config, display)
