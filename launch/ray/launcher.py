"""Ray as a cluster: its options, and what they say of machines."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from apb.clusters import CLUSTERS, Cluster, Launcher
from apb.host.messages import HostSpec
from burst.errors import in_range
from burst.registry import option


@CLUSTERS.register("ray", "one Ray actor a host, on this machine or on a running Ray cluster")
@dataclass(frozen=True)
class Ray(Launcher):
    """Starts a ``RayCluster``."""

    threads: int | None = option(
        None, "CPU threads a host; null: this machine's cores shared out, or 1 with an address"
    )
    address: str | None = option(None, "host:port of a running Ray cluster, or auto; null: start one here", text=True)
    startup_timeout_s: float = option(180.0, "seconds for the cluster to have room for all hosts and start them")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.startup_timeout_s
        in_range("cluster.startup_timeout_s", given, math.isfinite(given) and given > 0, "more than 0 seconds")

    def local_hosts(self, hosts: int) -> int | None:
        """All of them, unless a cluster is joined, whose hosts may run on other machines."""
        return None if self.address or os.environ.get("RAY_ADDRESS") else hosts

    def start(self, spec: HostSpec, hosts: int) -> Cluster:
        """Start Ray or join it, and an actor a host."""
        from launch.ray.cluster import RayCluster

        return RayCluster(spec, hosts, address=self.address, startup_timeout_s=self.startup_timeout_s)
