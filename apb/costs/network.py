"""Networks between hosts: link classes with bandwidth and latency, and who shares a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from burst.errors import in_range
from burst.planner.topology import Link, Machine, Topology
from burst.registry import option


@dataclass(frozen=True)
class Network:
    """Hosts side by side on machines of ``hosts_per_node``; each host has a port of its own for each link class.

    Bandwidths in GB (10^9 bytes) a second, one way; latencies in microseconds. Raises UserError for what is no speed.
    """

    name: str
    hosts_per_node: int = option(8, "hosts that share a machine's fast links")
    intra_gb_per_s: float = option(400.0, "GB (10^9 bytes) a second, one way, inside a machine")
    intra_us: float = option(5.0, "microseconds before the first byte")
    inter_gb_per_s: float = option(50.0, "bandwidth between machines, for each host")
    inter_us: float = option(15.0, "the latency between machines")

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            least = 0.0 if field.name.endswith("_us") else 1e-9
            fine = math.isfinite(value) and value >= least
            in_range(f"network.{field.name}", value, fine, "0 or more" if not least else "more than 0")

    def nodes(self, hosts: int) -> tuple[int, ...]:
        """Return the machine of every host."""
        return tuple(host // self.hosts_per_node for host in range(hosts))

    def topology(self, hosts: int) -> Topology:
        """Return the links for ``burst.planner.timeline``, which does not use the speeds of kernels: they are 1."""
        intra = Link(self.intra_gb_per_s * 1e9, self.intra_us / 1e6)
        inter = Link(self.inter_gb_per_s * 1e9, self.inter_us / 1e6)
        return Topology(self.nodes(hosts), Machine(intra, inter, flops=1.0, memory=1.0, call=0.0))
