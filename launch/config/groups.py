"""Groups of the configuration: what can be chosen in each, with the options of every choice.

Implementations come from their registries, presets from YAML files: conf/model, conf/network and conf/experiment, and
the same folders below a user's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from apb.clusters import CLUSTERS
from apb.compress import COMPRESSORS
from apb.costs.network import Network
from apb.decode import DECODERS
from apb.draft.spec import DraftSpec
from apb.strategies import STRATEGIES
from burst.errors import UserError
from burst.registry import Option, Registry, options
from launch.config.settings import BurstSettings, DecodeSettings, HeadSettings


class Group(ABC):
    """Names to choose from. ``presets``: whether they are files, which a user's own folder can add to."""

    presets = False

    @abstractmethod
    def names(self) -> list[str]:
        """Return all names."""

    @abstractmethod
    def summary(self, name: str) -> str:
        """Return a line about a name."""

    def shared(self) -> list[Option]:
        """Return the options that every choice has."""
        return []

    @abstractmethod
    def own(self, name: str) -> list[Option]:
        """Return the options that this choice has beside the shared ones."""

    def options(self, name: str) -> list[Option]:
        """Return all options of a choice."""
        return [*self.shared(), *self.own(name)]


class Implementations(Group):
    """A registry's classes, whose fields are their options."""

    def __init__(self, registry: Registry[Any]) -> None:
        self._registry = registry

    def names(self) -> list[str]:
        """Return all names; imports every implementation."""
        return self._registry.names()

    def summary(self, name: str) -> str:
        """Return the line about an implementation."""
        return self._registry.summary(name)

    def own(self, name: str) -> list[Option]:
        """Return the fields of the class."""
        return options(self._registry.get(name))


class Decoders(Implementations):
    """Decoders: all have the settings of generation, those that draft with a head have the head's as well."""

    def shared(self) -> list[Option]:
        """Return the settings of generation."""
        return options(DecodeSettings)

    def own(self, name: str) -> list[Option]:
        """Return the head's options and the decoder's own; raises UserError for one of these that others hide."""
        head = [*options(HeadSettings), *options(DraftSpec)] if self._registry.get(name).needs_head else []
        own, taken = options(self._registry.get(name)), {each.name for each in [*self.shared(), *head]}
        hidden = [f"decode.{each.name}" for each in own if each.name in taken]
        if hidden:
            raise UserError(
                f"the decoder '{name}' names an option as all decoders or draft heads do, which hides it",
                given=", ".join(hidden),
                allowed="fields of other names",
                remedy="Rename the decoder's field.",
            )
        return [*head, *own]


class Presets(Group):
    """The YAML files of a folder below conf/; ``kind``: the dataclass whose values they hold, if there is one."""

    presets = True

    def __init__(self, group: str, kind: type[Any] | None = None) -> None:
        self._group, self._kind = group, kind

    def names(self) -> list[str]:
        """Return the names of the files that come with this project."""
        folder = resources.files("conf").joinpath(self._group)
        return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))

    def summary(self, name: str) -> str:
        """Return the comment at the file's top."""
        return comment(resources.files("conf").joinpath(self._group, f"{name}.yaml"))

    def own(self, name: str) -> list[Option]:
        """Return the fields of the dataclass."""
        return options(self._kind) if self._kind is not None else []


class Planner(Group):
    """The planner of exact schedules: one choice."""

    def names(self) -> list[str]:
        """Return its only name."""
        return ["planner"]

    def summary(self, name: str) -> str:
        """Return a line about it."""
        return "predicted time of every exact schedule"

    def own(self, name: str) -> list[Option]:
        """Return its settings."""
        return options(BurstSettings)


GROUPS: dict[str, Group] = {
    "model": Presets("model"),
    "strategy": Implementations(STRATEGIES),
    "compress": Implementations(COMPRESSORS),
    "cluster": Implementations(CLUSTERS),
    "decode": Decoders(DECODERS),
    "burst": Planner(),
    "network": Presets("network", Network),
    "experiment": Presets("experiment"),
}


def comment(file: Traversable | Path) -> str:
    """Return the text of the comments at a YAML file's top, without Hydra's package line."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            found.append(line.removeprefix("#").strip())
    return " ".join(found)
