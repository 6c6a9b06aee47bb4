"""Handles of a process group's exchanges and relays.

A relay's receives are forwarded as they arrive, by a thread on CPU and by a side stream on GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist

from burst.errors import HostFailure
from burst.transport.base import Handle, Message
from burst.transport.operations import GroupOperations


class ExchangeHandle(Handle):
    """Point-to-point operations of one exchange."""

    def __init__(self, transport: GroupOperations, works: list[tuple[dist.Work, Message]], step: str) -> None:
        self._transport, self._works, self._step = transport, works, step

    def wait(self) -> None:
        t = self._transport
        t._observe("wait", self._step, -1)
        with t.waiting():
            for work, message in self._works:
                t.finish(work, message.peer, self._step)
        self._works = []


class RelayHandle(Handle):
    """Receives that are forwarded as they arrive: by a thread on CPU, by a side stream on GPU."""

    def __init__(
        self,
        transport: GroupOperations,
        sends: Sequence[Message],
        recvs: Sequence[Message],
        kind: str,
        step: str,
        forward_to: int | None,
    ) -> None:
        self._transport, self._step, self._kind, self._forward_to = transport, step, kind, forward_to
        self._failure: Exception | None = None
        # Received buffers are posted at once, so that no arrival waits for this rank's thread.
        self._pending = [(transport.start_recv(m, step), m) for m in recvs] if not transport.on_gpu else []
        self._sent: list[tuple[dist.Work, Message]] = [(transport.start_send(m, kind, step), m) for m in sends]
        self._thread: threading.Thread | None = None
        if transport.on_gpu:
            self._run_on_stream(recvs)
        elif recvs:
            self._thread = threading.Thread(target=self._run, name=f"relay-{step}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            for work, message in self._pending:
                self._transport.finish(work, message.peer, self._step)
                self._transport.arrived(message, self._step)
                self._forward(message)
        except Exception as failure:  # raised by wait(), in the rank's own thread
            self._failure = failure

    def _run_on_stream(self, recvs: Sequence[Message]) -> None:
        stream = self._transport.relay_stream()
        stream.wait_stream(torch.cuda.current_stream(self._transport.device))  # the buffers may be in use there
        with torch.cuda.stream(stream):
            for message in recvs:
                self._transport.start_recv(message, self._step).wait()  # orders the stream, does not block the host
                self._forward(message)

    def _forward(self, message: Message) -> None:
        if self._forward_to is not None:
            onward = Message(self._forward_to, message.tensor)
            self._sent.append((self._transport.start_send(onward, self._kind, self._step), onward))

    def wait(self) -> None:
        t = self._transport
        t._observe("wait", self._step, -1)
        with t.waiting():
            if self._thread is not None:
                self._thread.join(t.timeout_s + 5.0)
                if self._thread.is_alive():
                    raise HostFailure(f"no block within {t.timeout_s:.0f} s", rank=t.rank, step=self._step)
            if self._failure is not None:
                raise self._failure
            for work, message in self._sent:
                t.finish(work, message.peer, self._step)
            if t.on_gpu:
                torch.cuda.current_stream(t.device).wait_stream(t.relay_stream())
