"""Transport: one primitive (sends, receives, optional forwarding), and the collectives composed from it."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from burst.errors import HostFailure
from burst.transport.ledger import Ledger

TransportObserver = Callable[[str, str, int], None]  # (event "post" | "arrive" | "wait" | "compute", step, peer)


DEADLINE_S = 600.0  # of every operation, unless the transport is given another


class TransportOptions(TypedDict, total=False):
    """Options of every transport; see ``Transport``."""

    nodes: Sequence[int] | None
    device: torch.device | str
    timeout_s: float
    observer: TransportObserver | None


class Message(NamedTuple):
    """One tensor to or from one peer; a receive names the buffer it fills."""

    peer: int
    tensor: Tensor


class Handle(ABC):
    """Something under way; ``wait`` returns once every receive has arrived and every send may be forgotten."""

    @abstractmethod
    def wait(self) -> None:
        """Block until done, at the latest until the transport's deadline; raises HostFailure."""


class CallRecorder(Protocol):
    """The part of a recorder that a transport talks to; ``burst.planner.trace`` implements it."""

    @property
    def last(self) -> int:
        """The name of the call recorded last."""
        ...

    def follow(
        self, call: Callable[[], Handle], sends: Sequence[Message], recvs: Sequence[Message], to: int | None, step: str
    ) -> Handle:
        """Make a call and record it."""
        ...

    def wait(self, handle: Handle, name: int) -> None:
        """Wait for a recorded call and record that."""
        ...

    def during(self, part: str) -> AbstractContextManager[None]:
        """Count the caller's work inside as ``part``."""
        ...


class _Followed(Handle):
    """A handle whose wait is recorded."""

    def __init__(self, handle: Handle, recorder: CallRecorder) -> None:
        self._handle, self._recorder, self._name = handle, recorder, recorder.last

    def wait(self) -> None:
        self._recorder.wait(self._handle, self._name)


class Gathered(NamedTuple):
    """An all-gather under way: ``wait`` gives the tensors of all ranks, in rank order."""

    handle: Handle
    parts: list[Tensor]

    def wait(self) -> list[Tensor]:
        """Block until all parts are here and return them in rank order."""
        self.handle.wait()
        return self.parts


class Transport(ABC):
    """One rank's end of a group of ``world`` ranks.

    Shapes are known to both ends beforehand (the plan says them); empty tensors are never sent. ``nodes[r]`` is the
    machine that rank r runs on and decides the link class in the ledger. ``waited_s`` adds up, on ``clock``, the
    seconds spent waiting for peers, so that elapsed time less waited time is the rank's own work. ``recorder``, where
    set, sees every call and the work in between.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        nodes: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float = DEADLINE_S,
        observer: TransportObserver | None = None,
    ) -> None:
        assert 0 <= rank < world, (rank, world)
        self.rank = rank
        self.world = world
        self.nodes = tuple(nodes) if nodes is not None else (0,) * world
        assert len(self.nodes) == world, (self.nodes, world)
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        self.observer = observer
        self.ledger = Ledger()
        self.waited_s = 0.0
        self.clock: Callable[[], float] = time.perf_counter
        self.recorder: CallRecorder | None = None
        self.agreed: set[str] = set()  # what ``agree_once`` has found equal on all ranks

    # -- the primitive ------------------------------------------------------------------------------------------

    @abstractmethod
    def _exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, channel: str
    ) -> Handle:
        """Start sends and receives."""

    @abstractmethod
    def _relay(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, forward_to: int | None
    ) -> Handle:
        """Start sends and receives; a receive that has arrived is sent on to ``forward_to`` without the caller."""

    def exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], *, kind: str, step: str, channel: str = ""
    ) -> Handle:
        """Start point-to-point sends and receives; messages between two ranks keep their order.

        Exchanges of different channels that ``open`` has seen may overtake each other where the backend can. So both
        ends must name the same channel.
        """
        out, into = self._checked(sends, recvs, step)
        return self._followed(lambda: self._exchange(out, into, kind, step, channel), out, into, None, step)

    def open(self, channels: Sequence[str]) -> None:  # noqa: B027 - most transports need nothing
        """Prepare channels on all ranks together, in this order; a backend without channels has nothing to do."""

    def settle(self) -> None:  # noqa: B027 - most transports know at once
        """Bring ``waited_s`` up to date once the device has done all that it was given."""

    def mark(self, step: str, peer: int) -> None:
        """Tell the observer that the caller's own work on ``peer``'s data begins (event ``compute``)."""
        self._observe("compute", step, peer)

    def during(self, part: str) -> AbstractContextManager[None]:
        """Count the caller's work inside as ``part`` where it is recorded."""
        return nullcontext() if self.recorder is None else self.recorder.during(part)

    def relay(
        self, own: Tensor, buffers: Sequence[Tensor], *, src: int | None, dst: int | None, kind: str, step: str
    ) -> Handle:
        """Send ``own`` to ``dst`` and fill ``buffers`` from ``src`` in order, each forwarded to ``dst`` as it arrives.

        Forwarding needs no call by this rank's own thread, so every hop goes on while the caller computes.
        """
        sends = [] if dst is None else [Message(dst, own)]
        assert src is not None or not buffers
        recvs = [Message(src, b) for b in buffers] if src is not None else []
        out, into = self._checked(sends, recvs, step)
        return self._followed(lambda: self._relay(out, into, kind, step, dst), out, into, dst, step)

    def _followed(
        self, call: Callable[[], Handle], sends: list[Message], recvs: list[Message], to: int | None, step: str
    ) -> Handle:
        if self.recorder is None:
            return call()
        return _Followed(self.recorder.follow(call, sends, recvs, to, step), self.recorder)

    def _checked(
        self, sends: Sequence[Message], recvs: Sequence[Message], step: str
    ) -> tuple[list[Message], list[Message]]:
        out = [Message(peer, x.contiguous()) for peer, x in sends if x.numel()]
        into = [m for m in recvs if m.tensor.numel()]
        assert all(m.tensor.is_contiguous() for m in into), "receive buffers must be contiguous"
        self._observe("post", step, -1)
        return out, into

    # -- composed -----------------------------------------------------------------------------------------------

    def all_gather(self, x: Tensor, shapes: Sequence[Sequence[int]], *, kind: str, step: str) -> Gathered:
        """Give every rank every rank's tensor; ``shapes[r]`` is rank r's, ranks may differ."""
        assert tuple(x.shape) == tuple(shapes[self.rank]), (x.shape, shapes[self.rank])
        parts = [x if r == self.rank else x.new_empty(tuple(shapes[r])) for r in range(self.world)]
        peers = [r for r in range(self.world) if r != self.rank]
        handle = self.exchange(
            [Message(r, x) for r in peers], [Message(r, parts[r]) for r in peers], kind=kind, step=step
        )
        return Gathered(handle, parts)

    def broadcast(self, x: Tensor, src: int, *, kind: str, step: str) -> Handle:
        """Fill ``x`` on every rank with rank ``src``'s."""
        if self.rank != src:
            return self.exchange([], [Message(src, x)], kind=kind, step=step)
        peers = [r for r in range(self.world) if r != src]
        return self.exchange([Message(r, x) for r in peers], [], kind=kind, step=step)

    def agree(self, text: str, *, step: str, here: str = "") -> None:
        """Check that all ranks hold the same description before the first send; HostFailure names those that differ.

        ``here`` describes this rank to people. Costs 32 bytes to each peer (kind ``agree``).
        """
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        digest = digest.to(self.device)
        parts = self.all_gather(digest, [digest.shape] * self.world, kind="agree", step=step).wait()
        odd = [r for r, part in enumerate(parts) if not torch.equal(part, parts[0])]
        if odd:
            raise HostFailure(
                f"hosts {odd} hold another plan than host 0; all must run the same request and version"
                + (f"; here: {here}" if here else ""),
                rank=odd[0],
                step=step,
                peer=0,
            )

    def agree_once(self, text: str, *, step: str, here: str = "") -> None:
        """As ``agree``, but each text once: all ranks make the same calls, so they also skip the same ones."""
        if text not in self.agreed:
            self.agree(text, step=step, here=here)
            self.agreed.add(text)

    # -- for implementations ------------------------------------------------------------------------------------

    def _record(self, peer: int, tensor: Tensor, kind: str) -> None:
        link = "intra" if self.nodes[peer] == self.nodes[self.rank] else "inter"
        self.ledger.add(kind, link, tensor)

    def _observe(self, event: str, step: str, peer: int) -> None:
        if self.observer is not None:
            self.observer(event, step, peer)
