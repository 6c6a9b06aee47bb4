"""Clusters: hosts that execute the same call together, and the launchers that start them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from apb.host.messages import HostSpec, OnEvent
from burst.errors import in_range
from burst.registry import Registry, option


class Cluster(Protocol):
    """Hosts 0 .. ``hosts`` - 1, each an apb.host.host.Host in its own place.

    ``epoch`` counts restarts: caches of an earlier epoch are gone. ``call`` runs ``Host.method(*per_host[r])`` on every
    host r and returns the results by rank; when a host fails it raises that host's UserError or a HostFailure, and the
    next call finds working hosts again.
    """

    name: str
    hosts: int
    epoch: int

    def call(self, method: str, per_host: Sequence[tuple[Any, ...]], on_event: OnEvent | None = None) -> list[Any]:
        """Run one method on every host; host 0's events go to ``on_event`` in the caller's thread, as they come."""
        ...

    def close(self) -> None:
        """End all hosts; may be called twice."""
        ...


@dataclass(frozen=True)
class Launcher(ABC):
    """A way of starting a cluster; its fields are its options."""

    name: ClassVar[str]
    one_process: ClassVar[bool] = False  # whether hosts take turns in one process, which holds the weights once

    hosts: int | None = option(None, "null: 4 (full: 1)")
    threads: int | None = option(None, "CPU threads a host; null: this machine's cores shared out")

    def __post_init__(self) -> None:
        for name, count in (("hosts", self.hosts), ("threads", self.threads)):
            in_range(f"cluster.{name}", count, count is None or count >= 1, "1 or more")

    @property
    def started(self) -> int | None:
        """Hosts that are there already and are all to be used; None where they are started as asked."""
        return None

    def local_hosts(self, hosts: int) -> int | None:
        """Return how many of the hosts run on this machine; None where that is not known."""
        return hosts

    @abstractmethod
    def start(self, spec: HostSpec, hosts: int) -> Cluster:
        """Start the hosts and load the model on each; raises UserError where they cannot be had."""


CLUSTERS: Registry[type[Launcher]] = Registry("cluster", "apb.clusters", "cluster")
