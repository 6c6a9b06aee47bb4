"""torchrun's processes as a cluster: its options, and what torchrun says of machines."""

from __future__ import annotations

import os
from dataclasses import dataclass

from apb.clusters import CLUSTERS, Cluster, Launcher
from apb.host.messages import HostSpec
from burst.registry import option


@CLUSTERS.register("torchrun", "the processes that torchrun started")
@dataclass(frozen=True)
class Torchrun(Launcher):
    """Takes the processes that torchrun started."""

    hosts: int | None = option(None, "null: as many as torchrun started")

    @property
    def started(self) -> int | None:
        """As many as torchrun started."""
        return int(os.environ.get("WORLD_SIZE", "0")) or None

    def local_hosts(self, hosts: int) -> int | None:
        """All of them, unless torchrun says otherwise."""
        return max(1, min(hosts, int(os.environ.get("LOCAL_WORLD_SIZE", hosts))))

    def start(self, spec: HostSpec, hosts: int) -> Cluster:
        """Make each process a host; the processes of other ranks do not return."""
        from launch.torchrun.cluster import TorchrunCluster

        return TorchrunCluster(spec, hosts)
