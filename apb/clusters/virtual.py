"""All hosts in this process, sharing one model, one running at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from apb.clusters.base import CLUSTERS, Cluster, Launcher
from apb.host.messages import HostSpec, OnEvent
from burst.registry import option
from burst.transport import VirtualWorld

if TYPE_CHECKING:
    from apb.models.adapter import Adapter


class VirtualCluster:
    """``hosts`` virtual hosts; exact in what they compute and send, their compute timed one by one.

    ``adapter``: a model that is loaded already; ``nodes[r]``: the machine that host r is booked on (None: one machine).
    """

    name = "virtual"

    def __init__(
        self, spec: HostSpec, hosts: int, adapter: Adapter | None = None, nodes: Sequence[int] | None = None
    ) -> None:
        from apb.host.host import Host  # transformers takes seconds to import, and help texts ask for names of clusters
        from apb.host.load import load_adapter

        self.hosts, self.epoch = hosts, 0
        self._threads_before = torch.get_num_threads()
        adapter = adapter or load_adapter(spec)
        self._world = VirtualWorld(hosts, nodes=nodes, device=adapter.device)
        self._hosts = [Host(spec, t, adapter) for t in self._world.transports]

    def call(self, method: str, per_host: Sequence[tuple[Any, ...]], on_event: OnEvent | None = None) -> list[Any]:
        """Run one method on every host; the first failure is raised as it is."""
        self._hosts[0].on_event = on_event or (lambda event: None)
        return self._world.run(lambda t: getattr(self._hosts[t.rank], method)(*per_host[t.rank]))

    def close(self) -> None:
        """Drop the hosts and their caches."""
        self._hosts = []
        torch.set_num_threads(self._threads_before)


@CLUSTERS.register("virtual", "all hosts in this process, one after another: exact in results and bytes")
@dataclass(frozen=True)
class Virtual(Launcher):
    """Starts a ``VirtualCluster``; the weights are held once."""

    one_process: ClassVar[bool] = True

    threads: int | None = option(None, "CPU threads; null: 1")

    def start(self, spec: HostSpec, hosts: int) -> Cluster:
        """Load the model once and make the hosts."""
        return VirtualCluster(spec, hosts)
