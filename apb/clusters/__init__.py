"""Clusters by name: one file each, or another package's, as Ray and torchrun are ``launch``'s."""

from __future__ import annotations

import dataclasses
from typing import Any

from apb.clusters.base import CLUSTERS, Cluster, Launcher


def launcher(given: str | Launcher, **options: Any) -> Launcher:
    """Return the way of starting a cluster, by its name or another way with further options.

    Raises UserError for unknown names and options.
    """
    if isinstance(given, str):
        made: Launcher = CLUSTERS.make(given, options)
        return made
    CLUSTERS.check(given.name, options)
    return dataclasses.replace(given, **options)


__all__ = ["CLUSTERS", "Cluster", "Launcher", "launcher"]
