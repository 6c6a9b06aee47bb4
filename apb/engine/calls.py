"""Calls of a cluster's hosts, the caches' names, and the release of caches that nobody refers to any more."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from apb.clusters import Cluster
from apb.engine.checks import check_open
from apb.host.messages import OnEvent


class Names:
    """Names of one cluster's caches, which several engines may share."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.dropped = deque[tuple[str, int]]()  # caches (name, epoch) that nobody refers to any more

    def new(self) -> str:
        """Return a name that no cache has had."""
        return f"cache-{next(self._numbers)}"


_NAMES: weakref.WeakKeyDictionary[Cluster, Names] = weakref.WeakKeyDictionary()


class Calls:
    """The hosts' methods as calls on all of them; raises UserError once closed."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.names = _NAMES.setdefault(cluster, Names())
        self.closed = False

    def each(self, method: str, per_host: Sequence[tuple[Any, ...]], on_event: OnEvent | None = None) -> list[Any]:
        """Call a method with the arguments of each host, after freeing dropped caches; results by rank."""
        check_open(self.closed, method)
        dropped = self.names.dropped
        noted = [dropped.popleft() for _ in range(len(dropped))]
        unused = tuple(name for name, epoch in noted if epoch == self.cluster.epoch)
        if unused:
            self.cluster.call("release", [unused] * self.cluster.hosts)
        return self.cluster.call(method, per_host, on_event)

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method with the same arguments on every host."""
        return self.each(method, [arguments] * self.cluster.hosts)
