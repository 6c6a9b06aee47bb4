"""The Ray that hosts run on, started here (and ended with the last cluster) or joined; the places on it."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burst.errors import UserError
from launch.ray.actor import LOOPBACK
from launch.ray.watch import Watch
from launch.terminal.interrupt import keeping_handlers

# Logical CPUs of a Ray started here: slots for hosts, of several engines side by side; not cores.
SLOTS = 64
REACH_S = 10.0  # for a machine to accept a connection
NOTICE_S = 1.0  # a cluster with room gives it sooner
STORE_BYTES = 256 * 2**20  # prompts and logits go through Ray's object store; keys and values never do

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_users = 0  # clusters that stand on a Ray that we started
_watch: Watch | None = None


def load_ray() -> Any:
    """Return the module ``ray``; raises UserError when it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray writes its raylets' complaints to this process's stdout, where the answer goes.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            "cluster 'ray' needs Ray, which cannot be imported",
            given=f"cluster=ray ({error})",
            allowed="an installed Ray, or another cluster",
            remedy="Run: pip install ray. Or set cluster=virtual, which needs no Ray.",
        ) from error


def open_session(address: str | None, hosts: int) -> bool:
    """Use this process's Ray, join ``address``, or start one; return whether ``close_session`` is due.

    Raises UserError when there is no Ray at ``address``.
    """
    global _users
    ray = load_ray()
    with _lock:
        if ray.is_initialized():
            _users += 1 if _users else 0
            return _users > 0
        address = address or os.environ.get("RAY_ADDRESS") or None
        with keeping_handlers():
            if address is None:
                _start(ray, hosts)
            else:
                _join(ray, address)
        _users = 1
        return True


def close_session() -> None:
    """Leave the Ray that ``open_session`` started or joined; the last one ends it."""
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _end(load_ray())


def _start(ray: Any, hosts: int) -> None:
    global _watch
    # Short, since a socket's path may have 107 characters; its own, so that runs do not meet.
    base = "/tmp" if os.access("/tmp", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="apb-", dir=base))
    _watch = Watch(folder)
    # Ray's own default, once announced with a warning: actors without a GPU see none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, hosts, SLOTS),
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
        _watch.tell()
    except BaseException:  # Ctrl-C too
        _watch.tell()  # before Ray forgets what it had started
        _end(ray)
        raise


def _end(ray: Any) -> None:
    global _watch
    ray.shutdown()
    if _watch is not None:
        _watch.close()
        _watch = None


def _join(ray: Any, address: str) -> None:
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise UserError(
            f"cannot join a Ray cluster: {str(error).splitlines()[0]}",
            given=f"cluster.address={address}",
            allowed="auto, or HOST:PORT of a running Ray cluster of the same Ray and Python version",
            remedy="Start one with 'ray start --head', or leave cluster.address out to have one started.",
        ) from error


def _reach(address: str) -> None:
    """Raise an OSError or a ValueError when nobody listens at HOST:PORT; Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"'{address}' is not HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nobody answers at {address} ({error})") from error


@dataclass(frozen=True)
class Placement:
    """A place for every host: rank r runs in bundle ``bundles[r]`` of ``group``, on node ``nodes[r]``."""

    group: Any
    bundles: tuple[int, ...]
    nodes: tuple[int, ...]
    address: str  # where rank 0 listens
    at: dict[int, str]  # bundle to Ray's node id

    @property
    def alive(self) -> bool:
        """Whether Ray still keeps all places where they were, on machines that it believes to be up."""
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
    found = Placement(group, (), (), "", {})
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
            return Placement(group, bundles, nodes, address, at)
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
