"""Topology: the machine of each rank, and the speeds of links, memory and kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from burst.errors import UserError, choose


@dataclass(frozen=True)
class Link:
    """One rank's way to another: bytes a second in one direction, and seconds before the first byte."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """Speeds of one rank and its links.

    ``flops``: attention kernel, FLOP/s. ``memory``: bytes/s of sums and copies. ``call``: seconds a kernel
    call costs beside its work.
    """

    intra: Link
    inter: Link
    flops: float
    memory: float
    call: float


# H100: 600 TFLOP/s bf16 flash, 360 GB/s NVLink, 50 GB/s a NIC; latencies as NCCL's p2p has
# them. CPU: two cores of a laptop over gloo; orders of magnitude only.
MACHINES = {
    "cuda": Machine(Link(360e9, 5e-6), Link(50e9, 15e-6), 600e12, 2e12, 10e-6),
    "cpu": Machine(Link(2e9, 50e-6), Link(1e9, 200e-6), 50e9, 5e9, 20e-6),
}


@dataclass(frozen=True)
class Topology:
    """The ranks' machines: ``nodes[r]`` is the node of rank r."""

    nodes: tuple[int, ...]
    machine: Machine

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    def link(self, a: int, b: int) -> Link:
        """Return the link from rank a to rank b."""
        return self.machine.intra if self.nodes[a] == self.nodes[b] else self.machine.inter


def topology(ranks: int, nodes: int | Sequence[int] = 1, machine: Machine | str = "cuda") -> Topology:
    """Spread ``ranks`` evenly over ``nodes`` nodes, side by side; or take each rank's node as given.

    ``machine`` is ``cuda``, ``cpu`` or measured speeds. Raises UserError when the numbers do not fit.
    """
    if isinstance(machine, str):
        machine = MACHINES[choose("machine", machine, MACHINES)]
    speeds = (machine.intra.bandwidth, machine.inter.bandwidth, machine.flops, machine.memory)
    waits = (machine.intra.latency, machine.inter.latency, machine.call)
    if not all(x > 0 for x in speeds) or not all(x >= 0 for x in waits):  # a NaN is neither
        raise UserError(
            "speeds must be positive", given=machine, allowed="above 0", remedy="Check the bandwidths and FLOP/s."
        )
    if ranks < 1:
        raise UserError("a topology needs a rank", given=ranks, allowed="1 or more", remedy="Set more ranks.")
    if isinstance(nodes, int):
        if not 1 <= nodes <= ranks:
            raise UserError(
                "ranks do not fill the nodes",
                given=f"{ranks} ranks on {nodes} nodes",
                allowed=f"1 to {ranks} nodes",
                remedy="Set fewer nodes.",
            )
        nodes = [rank * nodes // ranks for rank in range(ranks)]
    if len(nodes) != ranks:
        raise UserError(
            "one node a rank is needed", given=len(nodes), allowed=ranks, remedy="List a node for every rank."
        )
    return Topology(tuple(nodes), machine)
