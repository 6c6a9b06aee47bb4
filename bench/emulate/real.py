"""Real hosts to compare predictions with: gloo processes on this machine, each pinned to a core of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from apb.clusters.outcome import Outcome, attempt, values
from apb.host.host import Host
from apb.host.messages import HostSpec, OnEvent
from burst.errors import HostFailure, UserError
from burst.transport import Transport
from burst.transport.base import Message
from burst.transport.process_group import ProcessGroupTransport

READY_S = 600.0  # seconds to load the model
BLOCK, TINY = 2**22, 8  # bytes of the messages that measure bandwidth and latency


class PinnedCluster:
    """One gloo process a host, on cores 0, 1, ...; a process that fails ends them all.

    Raises UserError where there are fewer cores than hosts, or where processes cannot be pinned.
    """

    name = "gloo"

    def __init__(self, spec: HostSpec, hosts: int) -> None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if hosts > len(cores):
            raise UserError(
                "every host needs a core of its own",
                given=f"{hosts} hosts",
                allowed=f"1 to {len(cores)}" if cores else "Linux, where processes can be pinned",
                remedy="Set a smaller bench.hosts.",
            )
        self.hosts, self.epoch = hosts, 0
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(hosts):
            mine, theirs = context.Pipe()
            arguments = (theirs, spec, rank, hosts, cores[rank], self._folder.name)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)
        self._answers("start", READY_S)

    def call(self, method: str, per_host: Sequence[tuple[Any, ...]], on_event: OnEvent | None = None) -> list[Any]:
        """Run one method on every host; events are not passed on. Raises what the first failed host raised."""
        for end, arguments in zip(self._ends, per_host, strict=True):
            end.send((method, arguments))
        return self._answers(method, READY_S)

    def close(self) -> None:
        """End the processes; may be called twice."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        self._folder.cleanup()

    def _answers(self, step: str, within_s: float) -> list[Any]:
        deadline = time.monotonic() + within_s
        outcomes: dict[int, Outcome] = {}
        for rank, end in enumerate(self._ends):
            if not end.poll(max(0.0, deadline - time.monotonic())):
                raise HostFailure("it does not answer", rank=rank, step=step)
            try:
                outcomes[rank] = end.recv()
            except EOFError as error:
                raise HostFailure("its process has ended", rank=rank, step=step) from error
        return values(outcomes)


def _serve(end: Connection, spec: HostSpec, rank: int, world: int, core: int, folder: str) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(spec.threads)

    def join() -> Host:
        store = dist.FileStore(f"{folder}/store", world)  # type: ignore[attr-defined]
        return Host(spec, ProcessGroupTransport.join(rank, world, store, timeout_s=spec.timeout_s))

    joined = attempt(join)
    host = joined.value
    end.send(Outcome(error=joined.error))
    while True:
        try:
            method, arguments = end.recv()
        except EOFError:
            return
        dist.barrier()  # all begin together, as the prediction assumes
        call = link if method == "link" else getattr(host, method)
        end.send(attempt(partial(call, *((host.transport,) if method == "link" else arguments))))


def link(transport: Transport) -> tuple[float, float]:
    """Return bytes a second, one way, and seconds of latency between ranks 0 and 1: half a round trip."""
    seconds = {}
    for size in (TINY, BLOCK):
        sent, got = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
        times = []
        for turn in range(12):
            start = time.perf_counter()
            for sender in (0, 1):
                messages = [Message(1 - transport.rank, sent if transport.rank == sender else got)]
                out, into = (messages, []) if transport.rank == sender else ([], messages)
                if transport.rank < 2:
                    transport.exchange(out, into, kind="link", step=f"link {turn}").wait()
            times.append((time.perf_counter() - start) / 2)
        seconds[size] = sorted(times)[len(times) // 2]
    return BLOCK / max(seconds[BLOCK] - seconds[TINY], 1e-9), seconds[TINY]
