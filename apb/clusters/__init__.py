"""Clusters by name: one file each, or another package's, as Ray and torchrun are ``launch``'s."""

from __future__ import annotations

from typing import Any

from apb.clusters.base import CLUSTERS, Cluster, Launcher


def launcher(name: str, **options: Any) -> Launcher:
    """Return the way of starting the cluster ``name``; raises UserError for unknown names and options."""
    made: Launcher = CLUSTERS.make(name, options)
    return made


__all__ = ["CLUSTERS", "Cluster", "Launcher", "launcher"]
