"""Places for hosts on a Ray cluster: one for each, spread over machines."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from burst.errors import UserError
from launch.hosts.meeting import LOOPBACK
from launch.ray.session import load_ray

NOTICE_S = 1.0  # a cluster with room gives it sooner

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """A place for every host: rank r runs in bundle ``bundles[r]`` of ``group``, on node ``nodes[r]``."""

    group: Any
    bundles: tuple[int, ...]
    nodes: tuple[int, ...]
    address: str  # where rank 0 listens
    at: dict[int, str]  # bundle to Ray's node id
    here: str  # the caller's node

    def is_here(self, rank: int) -> bool:
        """Return True for a host on the caller's machine."""
        return self.at[self.bundles[rank]] == self.here

    @property
    def alive(self) -> bool:
        """Return True while Ray keeps all places where they were, on machines that it believes to be up."""
        from ray.util import placement_group_table

        table = placement_group_table(self.group)
        up = {node["NodeID"] for node in load_ray().nodes() if node["Alive"]}
        return table["state"] == "CREATED" and table["bundles_to_node_id"] == self.at and up >= set(self.at.values())

    def remove(self) -> None:
        """Give the places back."""
        from ray.util import remove_placement_group

        remove_placement_group(self.group)


def place(hosts: int, on_gpu: bool, timeout_s: float) -> Placement:
    """Find room for the hosts, spread over machines; raises UserError when there is none in ``timeout_s``.

    Machines may still join, and others leave: what is waited for is logged as a warning.
    """
    ray = load_ray()
    from ray.util import placement_group, placement_group_table

    kind = "GPU" if on_gpu else "CPU"
    free = int(ray.available_resources().get(kind, 0))  # before this request holds some of it
    bundle = {"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1}
    group = placement_group([bundle] * hosts, strategy="SPREAD")
    found = Placement(group, (), (), "", {}, "")
    try:
        ready = group.wait(min(NOTICE_S, timeout_s))
        if not ready and timeout_s > NOTICE_S:
            there = _found(int(ray.cluster_resources().get(kind, 0)), free, hosts, kind)
            _log.warning("%s; waiting up to %.0f s for more", there, timeout_s)
            ready = group.wait(timeout_s - NOTICE_S)
        if ready:
            at = placement_group_table(group)["bundles_to_node_id"]
            here = ray.get_runtime_context().get_node_id()
            bundles, nodes = neighbours([at[i] for i in range(hosts)], first=here)
            address = LOOPBACK if len(set(nodes)) == 1 else _address(ray, at[bundles[0]])
            return Placement(group, bundles, nodes, address, at, here)
    except BaseException:
        found.remove()
        raise
    found.remove()
    raise _no_room(int(ray.cluster_resources().get(kind, 0)), free, hosts, kind, timeout_s)


def neighbours(node_of: list[str], first: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the bundles in rank order, one node's together and ``first``'s first, and node numbers."""
    names = sorted(set(node_of), key=lambda name: (name != first, node_of.index(name)))
    bundles = sorted(range(len(node_of)), key=lambda i: (names.index(node_of[i]), i))
    return tuple(bundles), tuple(names.index(node_of[i]) for i in bundles)


def _address(ray: Any, node_id: str) -> str:
    return str(next(n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node_id))


def _found(total: int, free: int, hosts: int, kind: str) -> str:
    return f"the Ray cluster has {total} {kind}s ({free} free), {hosts} hosts asked, one {kind} each"


def _no_room(total: int, free: int, hosts: int, kind: str, timeout_s: float) -> UserError:
    one_gpu = " To put several hosts on one GPU, set cluster=virtual." if kind == "GPU" else ""
    return UserError(
        f"{_found(total, free, hosts, kind)}; no room within {timeout_s:.0f} s",
        given=f"cluster.hosts={hosts}",
        allowed=f"up to {total}",
        remedy=f"Lower cluster.hosts, add machines to the cluster, or wait until others leave it.{one_gpu}",
    )
