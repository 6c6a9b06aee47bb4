"""One host inside a Ray actor. Runs in Ray's worker processes; knows nothing of Ray itself.

What is heavy is imported by the calls that need it, so that the process beats from its first second on.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import time
from typing import TYPE_CHECKING, Any

from launch.hosts.progress import Progress

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from apb.clusters.outcome import Outcome
    from apb.host.host import Host
    from apb.host.messages import HostSpec

# Events within this time travel together: a person sees no delay, and fifty trips a second are cheap.
LINGER_S = 0.02
# An events() call without any event returns after this time, so that none is left behind for ever.
IDLE_S = 2.0

Event = dict[str, Any]


class HostActor:
    """Holds an apb.host.host.Host between calls.

    Beside ``run``, ``events`` streams what it says and ``beat`` tells whether it goes on, each in a thread of its own.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._host: Host | None = None
        self._store: TCPStore | None = None
        self._events: dict[int, queue.SimpleQueue[Event | None]] = {}
        self._progress = Progress()

    def pid(self) -> int:
        """Return this process's id."""
        return os.getpid()

    def beat(self, after_s: float) -> float:
        """Wait a moment; return for how many seconds the work under way has stood still."""
        time.sleep(after_s)
        return self._progress.idle_s()

    def listen(self, address: str, world: int, timeout_s: float) -> Outcome:
        """Open the group's meeting point; return its port. Imports what hosts need, as ``prepare`` does."""
        from apb.clusters.outcome import attempt
        from launch.hosts.meeting import open_store

        def opened() -> int:
            import apb.host.host  # noqa: F401 - now, or the others would wait for it in the group

            self._store = open_store(address, world, timeout_s)
            port: int = self._store.port
            return port

        with self._progress.working():
            return attempt(opened)

    def prepare(self) -> Outcome:
        """Import what hosts need, while rank 0 does the same and opens the meeting point."""
        with self._progress.working():
            import apb.host.host
            from apb.clusters.outcome import attempt

            return attempt(lambda: apb.host.host.__name__)

    def start(self, spec: HostSpec, nodes: tuple[int, ...], address: str, port: int) -> Outcome:
        """Join the group and load the model."""
        from apb.clusters.outcome import attempt

        with self._progress.working():
            return attempt(lambda: self._start(spec, nodes, address, port))

    def run(self, number: int | None, method: str, args: tuple[Any, ...]) -> Outcome:
        """Run one method of the host; with a number, ``events(number)`` streams what it says meanwhile."""
        from apb.clusters.outcome import attempt

        host, progress = self._host, self._progress
        assert host is not None
        said = self._queue(number) if number is not None else None

        def on_event(event: Event) -> None:
            progress.step()
            if said is not None:
                said.put(event)

        host.on_event = on_event
        try:
            with progress.working():
                return attempt(lambda: getattr(host, method)(*args))
        finally:
            if said is not None:
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
        import torch

        from apb.host.host import Host
        from burst.transport.process_group import ProcessGroupTransport
        from launch.hosts.meeting import LOOPBACK, join_store, stay_on_loopback

        if spec.device.startswith("cuda"):
            spec = dataclasses.replace(spec, device="cuda:0")  # Ray shows an actor its own GPU only
            torch.cuda.set_device(0)
        if address == LOOPBACK:
            stay_on_loopback()
        store = self._store or join_store(address, port, len(nodes), spec.timeout_s)
        transport = ProcessGroupTransport.join(
            self._rank,
            len(nodes),
            store,
            nodes=nodes,
            device=spec.device,
            timeout_s=spec.timeout_s,
            observer=self._progress.step,
        )
        self._host = Host(spec, transport)
