"""The Ray that hosts run on, started here (and ended with the last cluster) or joined."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import threading
from typing import Any

from burst.errors import HostFailure, UserError
from launch.ray.private import Token, loopback, private_folder
from launch.ray.watch import Watch
from launch.terminal.interrupt import keeping_handlers

# Logical CPUs of a Ray started here: slots for hosts, of several engines side by side; not cores.
SLOTS = 64
REACH_S = 10.0  # for a machine to accept a connection
START_TRIES = 3  # Ray gives its own start 30 s, which a busy machine may not keep
STORE_BYTES = 256 * 2**20  # prompts and logits go through Ray's object store; keys and values never do

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_users = 0  # clusters that stand on a Ray that we started
_watch: Watch | None = None
_token: Token | None = None


def load_ray() -> Any:
    """Return the module ``ray``; raises UserError when it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray writes its raylets' complaints to this process's stdout, where the answer goes.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        # Ray reads it when it is imported. Its own handler ends the process at a SIGTERM, without a document.
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
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
    for tried in range(1, START_TRIES + 1):
        try:
            return _start_once(ray, hosts)
        except Exception as error:  # Ray raises just that, whatever was not there in time
            if tried == START_TRIES:
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise HostFailure(
                    f"Ray did not start on this machine, tried {tried} times: {said}", rank=0, step="start Ray"
                ) from error
            _log.warning("Ray did not start (%s); trying again", error)


def _start_once(ray: Any, hosts: int) -> None:
    global _watch, _token
    folder = private_folder()
    _watch, _token = Watch(folder), Token(folder)
    # Ray's own default, once announced with a warning: actors without a GPU see none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "60")
    try:
        with loopback(ray):
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, hosts, SLOTS),
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / "r"),  # Ray opens its own folder to everyone; the one around it keeps them out
            )
        _watch.tell()
    except BaseException:  # Ctrl-C too
        _watch.tell()  # before Ray forgets what it had started
        _end(ray)
        raise


def _end(ray: Any) -> None:
    global _watch, _token
    ray.shutdown()
    if _watch is not None:
        _watch.close()
        _watch = None
    if _token is not None:
        _token.forget()
        _token = None


def _join(ray: Any, address: str) -> None:
    try:
        with loopback(ray) if _only_here(ray, address) else contextlib.nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise UserError(
            f"cannot join a Ray cluster: {str(error).splitlines()[0]}",
            given=f"cluster.address={address}",
            allowed="auto, or HOST:PORT of a running Ray cluster of the same Ray and Python version",
            remedy="Start one with 'ray start --head', or leave cluster.address out to have one started.",
        ) from error


def _only_here(ray: Any, address: str) -> bool:
    """Return True where the Ray at HOST:PORT listens on loopback alone, as those started here do.

    Raises an OSError or a ValueError when nobody listens; Ray itself would try for minutes.
    """
    if address == "auto":
        return False
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"'{address}' is not HOST:PORT")
    host = host.strip("[]")
    try:
        _reach(host, int(port))
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nobody answers at {address} ({error})") from error
    if host not in ("localhost", "127.0.0.1", "::1"):
        return False
    try:
        _reach(ray.util.get_node_ip_address(), int(port))  # where Ray would look for it
    except OSError:
        return True
    return False


def _reach(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=REACH_S).close()
