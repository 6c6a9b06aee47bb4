"""One host inside a Ray actor. Runs in Ray's worker processes; knows nothing of Ray itself."""

from __future__ import annotations

import dataclasses
import os
import queue
import socket
import time
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from apb.clusters.outcome import Outcome, attempt
from apb.host.host import Host, HostSpec
from burst.transport.process_group import ProcessGroupTransport

LOOPBACK = "127.0.0.1"
# Events within this time travel together: a person sees no delay, and fifty trips a second are cheap.
LINGER_S = 0.02
# An events() call without any event returns after this time, so that none is left behind for ever.
IDLE_S = 2.0

Event = dict[str, Any]


class HostActor:
    """Holds an apb.host.host.Host between calls; ``events`` is called beside ``run`` and streams what it says."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._host: Host | None = None
        self._store: TCPStore | None = None
        self._events: dict[int, queue.SimpleQueue[Event | None]] = {}

    def pid(self) -> int:
        """Return this process's id."""
        return os.getpid()

    def listen(self, address: str, world: int, timeout_s: float) -> int:
        """Open the group's meeting point; return its port, which the system chooses: it is never busy."""
        self._store = TCPStore(
            address, 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        port: int = self._store.port
        return port

    def start(self, spec: HostSpec, nodes: tuple[int, ...], address: str, port: int) -> Outcome:
        """Join the group and load the model."""
        return attempt(lambda: self._start(spec, nodes, address, port))

    def run(self, number: int | None, method: str, args: tuple[Any, ...]) -> Outcome:
        """Run one method of the host; with a number, ``events(number)`` streams what it says meanwhile."""
        host = self._host
        assert host is not None
        if number is None:
            host.on_event = lambda event: None
            return attempt(lambda: getattr(host, method)(*args))
        said = self._queue(number)
        host.on_event = said.put
        try:
            return attempt(lambda: getattr(host, method)(*args))
        finally:
            said.put(None)

    def events(self, number: int) -> tuple[list[Event], bool]:
        """Wait for events of call ``number``; return them, and whether they were the last ones."""
        said = self._queue(number)
        batch: list[Event] = []
        deadline = time.monotonic() + IDLE_S
        while True:
            try:
                event = said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return batch, False
            if event is None:
                del self._events[number]
                return batch, True
            if not batch:
                deadline = time.monotonic() + LINGER_S
            batch.append(event)

    def _queue(self, number: int) -> queue.SimpleQueue[Event | None]:
        return self._events.setdefault(number, queue.SimpleQueue())  # whichever of run and events comes first

    def _start(self, spec: HostSpec, nodes: tuple[int, ...], address: str, port: int) -> None:
        if spec.device.startswith("cuda"):
            spec = dataclasses.replace(spec, device="cuda:0")  # Ray shows an actor its own GPU only
            torch.cuda.set_device(0)
        names = {name for _, name in socket.if_nameindex()}
        if address == LOOPBACK and "lo" in names:
            # Otherwise gloo asks for the machine's name, which laptops often cannot resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        timeout = timedelta(seconds=spec.timeout_s)
        store = self._store or TCPStore(address, port, len(nodes), timeout=timeout)
        transport = ProcessGroupTransport.join(
            self._rank, len(nodes), store, nodes=nodes, device=spec.device, timeout_s=spec.timeout_s
        )
        self._host = Host(spec, transport)
