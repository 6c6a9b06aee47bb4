"""Real ranks for tests: forked processes joined by gloo, started once for all tests that can share them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from burst.transport import VirtualWorld
from burst.transport.process_group import ProcessGroupTransport

_FORK = multiprocessing.get_context("fork")


@dataclass
class Rank:
    """What a function gets that runs on a rank: its transport, and a barrier that all ranks share."""

    transport: ProcessGroupTransport
    barrier: Barrier
    index: int
    world: int


class Pool:
    """``world`` processes in one gloo group that run the same function, again and again."""

    def __init__(self, world: int, timeout_s: float = 30.0, nodes: tuple[int, ...] | None = None) -> None:
        self.world = world
        address = ("127.0.0.1", _free_port())
        barrier = _FORK.Barrier(world)
        self._ends: list[Connection] = []
        self.processes = []
        for rank in range(world):
            mine, theirs = _FORK.Pipe()
            process = _FORK.Process(
                target=_serve,
                args=(theirs, [*self._ends, mine], rank, world, address, timeout_s, nodes, barrier),
            )
            process.daemon = True
            process.start()
            theirs.close()
            self._ends.append(mine)
            self.processes.append(process)

    def start(self, fn: Callable[..., Any], *args: Any, only: tuple[int, ...] | None = None) -> None:
        """Let ranks begin ``fn(rank, *args)``, which must be importable by name."""
        for rank in only if only is not None else range(self.world):
            self._ends[rank].send((fn, args))

    def answer(self, rank: int, within_s: float = 60.0) -> Any:
        """Return what a rank returned or, not raised, what it raised."""
        if not self._ends[rank].poll(within_s):
            raise TimeoutError(f"rank {rank} did not answer within {within_s} s")
        return self._ends[rank].recv()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``fn(rank, *args)`` on all ranks; returns the results, or raises the first error by rank."""
        self.start(fn, *args)
        answers = [self.answer(rank) for rank in range(self.world)]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def run_one(self, rank: int, fn: Callable[..., Any], *args: Any) -> Any:
        """Run ``fn(rank, *args)`` on one rank alone."""
        self.start(fn, *args, only=(rank,))
        return self.answer(rank)

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            with contextlib.suppress(OSError):  # the process may be dead
                end.send(None)
            end.close()
        deadline = time.monotonic() + 0.5
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


@functools.cache
def shared_pool(world: int) -> Pool:
    """Return the pool of that size that all tests of this process share; it ends with them.

    Take it before virtual hosts run: processes are forked when it is first asked for, and a fork takes along locks that
    threads hold.
    """
    pool = Pool(world)
    atexit.register(pool.close)
    return pool


def on_both(
    world: int, on_process: Callable[..., Any], on_virtual: Callable[..., Any], *args: Any
) -> tuple[list[Any], list[Any]]:
    """Return what ``on_process(rank, ...)`` gives on processes, and ``on_virtual(transport, ...)`` on virtual ranks."""
    found = shared_pool(world).run(on_process, *args)
    return found, VirtualWorld(world).run(lambda t: on_virtual(t, *args))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve(
    end: Connection,
    others: list[Connection],
    rank: int,
    world: int,
    address: tuple[str, int],
    timeout_s: float,
    nodes: tuple[int, ...] | None,
    barrier: Barrier,
) -> None:
    for other in others:  # forked along; left open they would keep their ranks from seeing the end
        other.close()
    torch.set_num_threads(1)
    transport = ProcessGroupTransport.connect(rank, world, address, timeout_s=timeout_s, nodes=nodes)
    me = Rank(transport, barrier, rank, world)
    while True:
        try:
            call = end.recv()
        except EOFError:
            call = None
        if call is None:
            os._exit(0)  # without the group's farewell, which would wait for ranks that are gone
        fn, args = call
        try:
            answer = fn(me, *args)
        except BaseException as error:  # the parent raises it
            answer = error
        end.send(answer)
