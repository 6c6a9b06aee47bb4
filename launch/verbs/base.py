"""Verbs: words of the command line with settings, found by name.

A verb's own module imports nothing heavy: what it runs is imported when it runs, its settings when they are shown.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from burst.errors import UserError
from burst.registry import Registry

if TYPE_CHECKING:
    from launch.config.schema import Configuration, Schema
    from launch.terminal.arguments import Arguments
    from launch.terminal.display import Display


class Verb(ABC):
    """A verb, or what a verb's NAME stands for.

    ``document``, ``query``, ``sweeps``: whether it takes -d, -q and -m. ``gathers``: whether all runs of a sweep work
    in one folder out=DIR, beside those of their own. ``examples``: command lines, each with a word about it.
    """

    name: ClassVar[str]
    document: ClassVar[bool] = False
    query: ClassVar[bool] = False
    sweeps: ClassVar[bool] = True
    gathers: ClassVar[bool] = False
    examples: ClassVar[tuple[tuple[str, str], ...]] = ()

    @property
    def names(self) -> Registry[type[Verb]] | None:
        """The names that the verb's NAME is one of; None where it takes no NAME."""
        return None

    @abstractmethod
    def settings(self) -> type[Any]:
        """Return the dataclass of its settings: fields declared by ``option`` and ``choice``."""

    def schema(self) -> Schema:
        """Return what its configuration consists of."""
        from launch.config.schema import Schema

        return Schema(self.name, self.settings())

    @abstractmethod
    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Run with one resolved configuration and return the document; raises UserError."""


class NamedVerb(Verb):
    """A verb whose NAME is a verb of another registry. ``default``: the NAME taken without one; ``nested``: whether the
    NAME's options are keys below the verb's own name."""

    default: ClassVar[str | None] = None
    nested: ClassVar[bool] = False

    @property
    @abstractmethod
    def names(self) -> Registry[type[Verb]]:
        """What NAME is one of."""

    def schema(self) -> Schema:
        """Return what its configuration consists of, for every NAME."""
        from launch.config.schema import Schema

        named = {name: self.names.get(name)().settings() for name in self.names}
        return Schema(self.name, self.settings(), named, self.default, self.nested)

    def run(self, arguments: Arguments, config: Configuration, display: Display) -> dict[str, Any]:
        """Run what NAME stands for; raises UserError without one."""
        if config.name is None:
            known = self.names.names()
            raise UserError(
                f"no {self.names.kind} named",
                given=f"apb {self.name}",
                allowed=", ".join(known),
                remedy=f"Write 'apb {self.name} {known[0]}', for example.",
            )
        return self.names.get(config.name)().run(arguments, config, display)


VERBS: Registry[type[Verb]] = Registry("verb", "launch.verbs", "verb")
