"""What a cluster is: some hosts that execute the same call together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from apb.host.host import OnEvent


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
