"""Virtual ranks: N threads of one process, one running at a time: deterministic, and each rank's work can be timed.

A rank runs only while it holds the baton. It hands over after posting and while waiting, to the next
rank in cyclic order that can go on. So every rank has posted before any computes, a deadlock is found at once rather
than after a timeout, and no lock is needed: only one thread ever runs.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TypeVar, Unpack

import torch
from torch import Tensor

from burst.errors import HostFailure
from burst.transport.base import Handle, Message, Transport, TransportObserver, TransportOptions

T = TypeVar("T")


class _Op:
    """One posted send or receive."""

    def __init__(self, tensor: Tensor, kind: str, step: str, then: Callable[[], None] | None = None) -> None:
        self.tensor = tensor
        self.kind = kind
        self.step = step
        self.then = then  # what arrival sets off: forwarding
        self.done = False


class _VirtualHandle(Handle):
    def __init__(self, transport: VirtualTransport, ops: list[tuple[_Op, int]], step: str) -> None:
        self._transport, self._step = transport, step
        self._ops = ops  # with their peers; a relay's forwards join as their blocks arrive

    def wait(self) -> None:
        t = self._transport
        t._observe("wait", self._step, -1)
        pending = next((peer for op, peer in self._ops if not op.done), None)
        if pending is not None:
            t._world.hand_over(t, lambda: all(op.done for op, _ in self._ops), self._step, pending)


class VirtualTransport(Transport):
    """One rank of a VirtualWorld."""

    def __init__(self, rank: int, world: VirtualWorld, **options: Unpack[TransportOptions]) -> None:
        super().__init__(rank, world.size, **options)
        self._world = world

    def _exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, channel: str
    ) -> Handle:
        return self._relay(sends, recvs, kind, step, None)

    def _relay(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, forward_to: int | None
    ) -> Handle:
        ops: list[tuple[_Op, int]] = []
        for peer, x in sends:  # before the receives: a block that is here already is forwarded after one's own
            ops.append((self._send(peer, x, kind, step), peer))
        for peer, x in recvs:
            ops.append((self._receive(peer, x, kind, step, forward_to, ops), peer))
        self._world.hand_over(self, lambda: True, step, None)
        return _VirtualHandle(self, ops, step)

    def _send(self, peer: int, x: Tensor, kind: str, step: str) -> _Op:
        self._record(peer, x, kind)
        op = _Op(x, kind, step)
        self._world.match(self.rank, peer, send=op)
        return op

    def _receive(
        self, peer: int, buffer: Tensor, kind: str, step: str, forward_to: int | None, ops: list[tuple[_Op, int]]
    ) -> _Op:
        def arrived() -> None:
            self._observe("arrive", step, peer)
            if forward_to is not None:
                ops.append((self._send(forward_to, buffer, kind, step), forward_to))

        op = _Op(buffer, kind, step, arrived)
        self._world.match(peer, self.rank, recv=op)
        return op


class VirtualWorld:
    """A group of ``size`` virtual ranks; ``run`` executes one function on all of them and may be called again."""

    def __init__(
        self,
        size: int,
        *,
        nodes: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        observers: Sequence[TransportObserver | None] | None = None,
    ) -> None:
        self.size = size
        watch = observers if observers is not None else [None] * size
        self.transports = [
            VirtualTransport(r, self, nodes=nodes, device=device, observer=watch[r]) for r in range(size)
        ]
        self._reset()

    def _reset(self) -> None:
        self._failure: BaseException | None = None
        for transport in self.transports:
            transport.agreed.clear()  # a run that failed may have left some ranks ahead of others
        self._batons = [threading.Semaphore(0) for _ in range(self.size)]
        self._blocked: dict[int, tuple[Callable[[], bool], str, int | None]] = {}
        self._sends: defaultdict[tuple[int, int], deque[_Op]] = defaultdict(deque)
        self._recvs: defaultdict[tuple[int, int], deque[_Op]] = defaultdict(deque)

    def run(self, fn: Callable[[Transport], T]) -> list[T]:
        """Run ``fn(transport)`` on every rank and return the results by rank; the first rank's failure is raised."""
        self._reset()
        results: dict[int, T] = {}
        self._blocked = {r: ((lambda: True), "start", None) for r in range(self.size)}
        threads = [
            threading.Thread(target=self._body, args=(r, fn, results), name=f"virtual-rank-{r}", daemon=True)
            for r in range(self.size)
        ]
        for thread in threads:
            thread.start()
        self._batons[0].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as stop:  # Ctrl-C in the driver: the ranks end at their next call
            self._failure = self._failure or stop
            for thread in threads:
                thread.join()
            raise
        if self._failure is not None:
            raise self._failure
        return [results[r] for r in range(self.size)]

    def _body(self, rank: int, fn: Callable[[Transport], T], results: dict[int, T]) -> None:
        self._batons[rank].acquire()
        del self._blocked[rank]
        try:
            if self._failure is None:
                # One autograd thread serves a device: a rank that waits for a peer inside it would wait for ever,
                # because the peer's backward needs the same thread. So every rank's backward stays in its own.
                with torch.autograd.set_multithreading_enabled(False):
                    results[rank] = fn(self.transports[rank])
        except BaseException as error:  # handed to the driver, which raises it
            if self._failure is None:
                self._failure = error
        finally:
            if self._blocked:
                self._batons[self._next(rank)].release()

    def hand_over(self, transport: VirtualTransport, ready: Callable[[], bool], step: str, peer: int | None) -> None:
        """Let other ranks run; return when it is this rank's turn again and ``ready()`` holds."""
        rank = transport.rank
        if transport.device.type == "cuda":
            torch.cuda.synchronize(transport.device)  # so that a segment's time is this rank's own
        start = transport.clock()
        self._blocked[rank] = (ready, step, peer)
        chosen = self._next(rank)
        if chosen != rank:
            self._batons[chosen].release()
            self._batons[rank].acquire()
        del self._blocked[rank]
        transport.waited_s += transport.clock() - start
        if self._failure is not None:
            raise HostFailure(f"stopped because another host failed: {self._failure}", rank=rank, step=step)

    def _next(self, rank: int) -> int:
        """Return the next blocked rank that can go on. None means a deadlock, of which every rank is then told."""
        order = [(rank + k) % self.size for k in range(1, self.size + 1)]
        waiting = [r for r in order if r in self._blocked]
        if self._failure is None:
            for r in waiting:
                if self._blocked[r][0]():
                    return r
            first = min(waiting)
            _, step, peer = self._blocked[first]
            ended = sorted(set(range(self.size)) - set(self._blocked))
            self._failure = HostFailure(
                f"every host waits and none can go on (ended already: {ended})", rank=first, step=step, peer=peer
            )
        return waiting[0]

    def match(self, src: int, dst: int, send: _Op | None = None, recv: _Op | None = None) -> None:
        """Queue a send or a receive between two ranks and deliver the messages that have both ends now, in order."""
        sends, recvs = self._sends[src, dst], self._recvs[src, dst]
        if send is not None:
            sends.append(send)
        if recv is not None:
            recvs.append(recv)
        while sends and recvs:
            out, into = sends.popleft(), recvs.popleft()
            sent, expected = (f"{op.kind} {tuple(op.tensor.shape)} {op.tensor.dtype}" for op in (out, into))
            if sent != expected:
                message = f"sent {sent} in '{out.step}', but the receiver expects {expected}"
                raise HostFailure(message, rank=src, step=into.step, peer=dst)
            into.tensor.copy_(out.tensor)
            out.done = into.done = True
            then, into.then = into.then, None  # it knows the operations, this one too: nobody would free its buffer
            if then is not None:
                then()


def run_virtual(
    world: int,
    fn: Callable[[Transport], T],
    *,
    nodes: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    observers: Sequence[TransportObserver | None] | None = None,
) -> list[T]:
    """Run ``fn(transport)`` on every virtual rank of this process and return the results by rank."""
    return VirtualWorld(world, nodes=nodes, device=device, observers=observers).run(fn)
