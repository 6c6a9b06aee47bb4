"""Clusters by name. Ray and torchrun live in ``launch``, which may import ray; they are loaded when asked for."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from apb.clusters.base import Cluster
from apb.host.host import HostSpec
from burst.errors import choose
from burst.registry import check_options

CLUSTERS = {
    "virtual": "apb.clusters.virtual:VirtualCluster",
    "ray": "launch.ray.cluster:RayCluster",
    "torchrun": "launch.torchrun.cluster:TorchrunCluster",
}


def cluster(name: str, spec: HostSpec, hosts: int, **options: Any) -> Cluster:
    """Start the cluster ``name``; raises UserError for unknown names and options."""
    module, _, attribute = CLUSTERS[choose("cluster", name, CLUSTERS)].partition(":")
    make = getattr(importlib.import_module(module), attribute)
    check_options("cluster", "cluster", name, options, list(inspect.signature(make).parameters)[2:])
    made: Cluster = make(spec, hosts, **options)
    return made


__all__ = ["CLUSTERS", "Cluster", "cluster"]
