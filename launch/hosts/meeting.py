"""The store at which hosts meet before they are a process group."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"


def listen(address: str, callers: int) -> socket.socket:
    """Listen at ``address``, a name or a number of this machine, on a port that the system chooses: it is never busy.

    A machine whose own name means loopback, to itself alone, listens on all its interfaces.
    """
    family, _, _, _, found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    host = str(found[0])
    if ipaddress.ip_address(host).is_loopback and address not in (LOOPBACK, "localhost", host):
        host = ""
    return socket.create_server((host, 0), family=family, backlog=max(128, callers))


def open_store(address: str, world: int, timeout_s: float) -> TCPStore:
    """Open a store at ``address`` and nowhere else."""
    listener = listen(address, world)
    return TCPStore(
        address,
        listener.getsockname()[1],
        world,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_store(address: str, port: int, world: int, timeout_s: float) -> TCPStore:
    """Reach the store that another host has opened."""
    return TCPStore(address, port, world, timeout=timedelta(seconds=timeout_s))


def stay_on_loopback() -> None:
    """Have this process's connections to peers listen on this machine's loopback only.

    gloo would also ask for the machine's name, which laptops often cannot resolve.
    """
    names = {name for _, name in socket.if_nameindex()}
    for loopback in ("lo", "lo0"):
        if loopback in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
