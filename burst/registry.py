"""Implementations by name, and their options.

An implementation is registered by its own module. A name is looked for among the modules of the kind's package, one
file a name, and then among the Python entry points of that package's name, so that any installed package can add one:

    [project.entry-points."apb.strategies"]
    mine = "my_package.mine"

Modules are imported when their names are asked for. Options are the fields of a dataclass, each with its help text.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from burst.errors import UserError, choose

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])


def option(default: Any, help: str, *, text: bool = False) -> Any:
    """Declare an option of a dataclass: a field with its ``default`` and its ``help`` text.

    ``text``: free text or a path, which the command line takes as it is.
    """
    about = {"help": help, "text": text}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def same(kind: type[Any], name: str, default: Any = dataclasses.MISSING, text: bool | None = None) -> Any:
    """Declare the option ``name`` of another dataclass: its help text, and its default unless another is given."""
    (found,) = (each for each in options(kind) if each.name == name)
    default = found.default if default is dataclasses.MISSING else default
    return option(default, found.help, text=found.text if text is None else text)


@dataclass(frozen=True)
class Option:
    """One option as declared: its name, type, default and help text; ``text``: free text or a path."""

    name: str
    hint: Any
    default: Any
    help: str
    text: bool


def options(kind: type[Any]) -> list[Option]:
    """Return the options of a dataclass in the order of their declaration; fields without a help text are none."""
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:
            make = field.default_factory
            default = field.default if make is dataclasses.MISSING else make()
            about = field.metadata
            found.append(Option(field.name, hints[field.name], default, about["help"], about["text"]))
    return found


@functools.cache
def _entry_points(group: str) -> Mapping[str, importlib.metadata.EntryPoint]:
    """Return a group's entry points of all packages by name.

    A package may be found twice, as where a checkout keeps what an earlier installation wrote into it: both count.
    Raises UserError where two packages have one name for different modules.
    """
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for distribution in importlib.metadata.distributions():
        for entry in distribution.entry_points:
            if entry.group != group:
                continue
            held = found.setdefault(entry.name, entry)
            if held.value != entry.value:
                raise UserError(
                    f"two installed packages have an entry point '{entry.name}' in {group}",
                    given=f"{held.value} and {entry.value}",
                    allowed="one module a name",
                    remedy="Uninstall one of them, or rename its entry point.",
                )
    return found


def _written(kind: Any) -> str:
    """Return where a class is written."""
    return f"{kind.__module__}.{kind.__qualname__}"


class Registry(Generic[T]):
    """The implementations of one kind.

    ``kind`` is the word for people, ``key`` the configuration's group. ``package`` holds the modules that come with
    this project and names the group of entry points.
    """

    def __init__(self, kind: str, package: str, key: str) -> None:
        self.kind, self.package, self.key = kind, package, key
        self._found: dict[str, T] = {}
        self._summaries: dict[str, str] = {}

    def register(self, name: str, summary: str) -> Callable[[C], C]:
        """Return a decorator that enters a class under ``name``, which becomes its attribute ``name``.

        The decorator raises UserError where another class has that name; the same one may come again, as in notebooks.
        """

        def enter(kind: C) -> C:
            held = self._found.get(name)
            if held is not None and _written(held) != _written(kind):
                raise UserError(
                    f"two classes are registered as the {self.kind} '{name}'",
                    given=f"{_written(held)} and {_written(kind)}",
                    allowed="one class a name",
                    remedy="Register one of them under another name, or uninstall its package.",
                )
            kind.name = name
            self.add(name, summary, typing.cast(T, kind))
            return kind

        return enter

    def add(self, name: str, summary: str, made: T) -> T:
        """Enter ``made`` under ``name`` and return it; ``summary`` is one line for people."""
        self._found[name], self._summaries[name] = made, summary
        return made

    def names(self) -> list[str]:
        """Return all names, those of this project first; imports every module."""
        for module in self._modules():
            importlib.import_module(module)
        for name, entry in self._entries().items():
            if name not in self._found:
                self._load(name, entry)
        entries = self._entries()
        return sorted(self._found, key=lambda name: (name in entries, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def summary(self, name: str) -> str:
        """Return the line about an implementation; raises UserError for an unknown name."""
        self.get(name)
        return self._summaries[name]

    def get(self, name: str) -> T:
        """Return the implementation ``name``; raises UserError with the nearest names, or for a plug-in that fails."""
        if name not in self._found and name.isidentifier() and importlib.util.find_spec(f"{self.package}.{name}"):
            importlib.import_module(f"{self.package}.{name}")
        if name not in self._found and name in (entries := self._entries()):
            self._load(name, entries[name])
        if name not in self._found:
            choose(self.kind, name, self.names())
        return self._found[name]

    def make(self, name: str, given: Mapping[str, Any]) -> Any:
        """Make the class ``name`` with options; raises UserError for unknown ones."""
        kind: Any = self.get(name)
        self.check(name, given)
        return kind(**given)

    def check(self, name: str, given: Mapping[str, Any]) -> None:
        """Raise UserError for the first of the given options that the class ``name`` does not have."""
        kind: Any = self.get(name)
        known = [each.name for each in options(kind)]
        for given_name in given:
            if given_name not in known:
                raise UserError(
                    f"{self.kind} '{name}' has no option '{given_name}'",
                    given=given_name,
                    allowed=", ".join(known) or "no options",
                    remedy=f"Remove {self.key}.{given_name} or choose another {self.kind}.",
                )

    def _modules(self) -> list[str]:
        path = importlib.import_module(self.package).__path__
        return [f"{self.package}.{m.name}" for m in pkgutil.iter_modules(path) if not m.ispkg]

    def _entries(self) -> Mapping[str, importlib.metadata.EntryPoint]:
        return _entry_points(self.package)

    def _load(self, name: str, entry: importlib.metadata.EntryPoint) -> None:
        try:
            entry.load()
        except Exception as error:  # a package of somebody else's: whatever it raises is theirs to mend
            raise UserError(
                f"the {self.kind} '{name}' of another package cannot be loaded: {type(error).__name__}: {error}",
                given=f"{name} = {entry.value}",
                allowed="a module that can be imported",
                remedy="Mend that package, or uninstall it.",
            ) from error
        if name not in self._found:
            raise UserError(
                f"the module {entry.value} registers no {self.kind} '{name}'",
                given=f"{name} = {entry.value}",
                allowed=f"a module that registers '{name}' in {self.package}",
                remedy="Name the entry point as the implementation is registered.",
            )
