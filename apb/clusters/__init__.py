"""Clusters by name. Ray and torchrun live in ``launch``, which may import ray; they are loaded when asked for."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from apb.clusters.base import Cluster
from apb.host import HostSpec
from burst.errors import UserError, choose

CLUSTERS = {
    "virtual": "apb.clusters.virtual:VirtualCluster",
    "ray": "launch.ray_cluster:RayCluster",
    "torchrun": "launch.torchrun:TorchrunCluster",
}


def cluster(name: str, spec: HostSpec, hosts: int, **options: Any) -> Cluster:
    """Start the cluster ``name``; raises UserError for unknown names and options."""
    module, _, attribute = CLUSTERS[choose("cluster", name, CLUSTERS)].partition(":")
    make = getattr(importlib.import_module(module), attribute)
    allowed = list(inspect.signature(make).parameters)[2:]
    for option in options:
        if option not in allowed:
            raise UserError(
                f"cluster '{name}' has no option '{option}'",
                given=option,
                allowed=", ".join(allowed) or "no options",
                remedy=f"Remove cluster.{option} or choose another cluster.",
            )
    made: Cluster = make(spec, hosts, **options)
    return made


__all__ = ["CLUSTERS", "Cluster", "cluster"]
