"""A verb's configuration as its dataclasses declare it, and the nodes that Hydra composes it of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from burst.registry import Option, options
from launch.config.fields import Choice, choices


@dataclass(frozen=True)
class Schema:
    """The settings of the verb ``root``.

    ``settings``: the dataclass of what every run has. For a verb with a NAME, ``named`` holds a dataclass for each
    name, ``default`` the one taken without a NAME (None: none); their options are keys below the verb's own name where
    ``nested`` is set, else beside the verb's.
    """

    root: str
    settings: type[Any]
    named: Mapping[str, type[Any]] = field(default_factory=dict)
    default: str | None = None
    nested: bool = False

    def choices(self, name: str | None) -> list[Choice]:
        """Return the groups to choose from, with this NAME."""
        found = choices(self.settings) + (choices(self.named[name]) if name else [])
        return list({each.group: each for each in found}.values())

    def groups(self) -> list[str]:
        """Return all groups that some run chooses from."""
        return list(dict.fromkeys(each.group for name in [None, *self.named] for each in self.choices(name)))

    def options(self, name: str | None) -> dict[str, Option]:
        """Return the options outside groups by key, with this NAME."""
        found = {each.name: each for each in options(self.settings)}
        prefix = f"{self.root}." if self.nested else ""
        if name:
            found |= {f"{prefix}{each.name}": each for each in options(self.named[name])}
        return found


@dataclass(frozen=True)
class Configuration:
    """A run's resolved configuration, and what the verb's NAME was chosen to be (None: nothing)."""

    values: dict[str, Any]
    name: str | None = None


def defaults(found: list[Option]) -> dict[str, Any]:
    """Return options with their defaults, as a configuration holds them: lists instead of tuples."""
    return {each.name: list(each.default) if isinstance(each.default, tuple) else each.default for each in found}


def nodes(schema: Schema) -> Iterator[tuple[str, str | None, str | None, dict[str, Any]]]:
    """Yield Hydra's nodes (name, group, package, values) for a verb: its root, and its group of NAMEs."""
    named: list[Any] = [{schema.root: schema.default}] if schema.named else []
    chosen = [{each.group: each.default} for each in choices(schema.settings)]
    order = [*chosen, *named, "_self_", {"experiment": None}]
    yield schema.root, None, None, {"defaults": order} | defaults(options(schema.settings))
    for name, kind in schema.named.items():
        new = [each for each in choices(kind) if each not in choices(schema.settings)]
        groups: list[Any] = [{f"/{each.group}@_global_.{each.group}": each.default} for each in new]
        own = [each for each in options(kind) if schema.nested or each not in options(schema.settings)]
        label = {"name": name} if schema.nested else {}
        package = None if schema.nested else "_global_"
        yield name, schema.root, package, {"defaults": [*groups, "_self_"]} | label | defaults(own)
