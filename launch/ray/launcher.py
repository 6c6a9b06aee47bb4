"""Ray as a cluster: its options, and what they say of machines."""

from __future__ import annotations

import os
from dataclasses import dataclass

from apb.clusters import CLUSTERS, Cluster, Launcher
from apb.host.messages import HostSpec
from burst.registry import option


@CLUSTERS.register("ray", "one Ray actor a host, on this machine or on a running Ray cluster")
@dataclass(frozen=True)
class Ray(Launcher):
    """Starts a ``RayCluster``."""

    threads: int | None = option(
        None, "CPU threads a host; null: this machine's cores shared out, or 1 with an address"
    )
    address: str | None = option(None, "host:port of a running Ray cluster, or auto; null: start one here", text=True)

    def local_hosts(self, hosts: int) -> int | None:
        """All of them, unless a cluster is joined, whose hosts may run on other machines."""
        return None if self.address or os.environ.get("RAY_ADDRESS") else hosts

    def start(self, spec: HostSpec, hosts: int) -> Cluster:
        """Start Ray or join it, and an actor a host."""
        from launch.ray.cluster import RayCluster

        return RayCluster(spec, hosts, address=self.address)
