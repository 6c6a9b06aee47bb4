"""Operations of a torch.distributed group: posting one send or receive, waiting for it, and counting the wait.

On GPUs nothing here makes the host wait. NCCL runs every message on a stream of its own, which begins when the stream
that posted it has come that far; a handle's ``wait`` makes the rank's stream, not its thread, wait for the message. A
buffer is made on the rank's stream and given back there, after such a wait: no message uses its memory any more, and no
stream has to be recorded with the allocator. ``docs/gpu.md`` has the whole account.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Unpack

import torch
import torch.distributed as dist

from burst.errors import HostFailure, UserError
from burst.transport.base import Message, Transport, TransportOptions


class GroupOperations(Transport):
    """A transport with the operations that handles of a process group need."""

    def __init__(self, **options: Unpack[TransportOptions]) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size(), **options)
        self.on_gpu = dist.get_backend() == "nccl"
        if not self.on_gpu and self.device.type != "cpu":
            raise UserError(
                "gloo groups hold their tensors on the CPU",
                given=f"gloo with device {self.device}",
                allowed="gloo with cpu, nccl with cuda",
                remedy="Set device=cpu, or give every host its own GPU, or use cluster=virtual on one GPU.",
            )
        # Relays run beside the rank's own exchanges: their own communicator keeps the two orders apart.
        self._relay_group = dist.new_group(timeout=timedelta(seconds=self.timeout_s))
        self._stream: torch.cuda.Stream | None = None
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def settle(self) -> None:
        while self._stalls:
            self._settle_first()

    def _settle_first(self) -> None:
        begun, ended = self._stalls.popleft()
        self.waited_s += begun.elapsed_time(ended) / 1000

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting: the thread's, or on GPUs the stream's, known once the stream is done."""
        if not self.on_gpu:
            start = self.clock()
            yield
            self.waited_s += self.clock() - start
            return
        stream = torch.cuda.current_stream(self.device)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record(stream)
        yield
        ended.record(stream)
        self._stalls.append((begun, ended))
        while self._stalls and self._stalls[0][1].query():  # those that are over already: nobody may ever settle
            self._settle_first()

    def start_recv(self, message: Message, step: str) -> dist.Work:
        """Post one receive of a relay."""
        return self._start(dist.irecv, message, step)

    def start_send(self, message: Message, kind: str, step: str) -> dist.Work:
        """Post and book one send of a relay."""
        self._record(message.peer, message.tensor, kind)
        return self._start(dist.isend, message, step)

    def _start(self, operation: Callable[..., dist.Work | None], message: Message, step: str) -> dist.Work:
        try:
            work = operation(message.tensor, message.peer, group=self._relay_group)
        except RuntimeError as error:
            raise self._failure(error, message.peer, step) from error
        assert work is not None
        return work

    def arrived(self, message: Message, step: str) -> None:
        """Say that a relayed block is here; a test's transport delays arrivals by overriding this."""
        self._observe("arrive", step, message.peer)

    def finish(self, work: dist.Work, peer: int, step: str) -> None:
        """Wait for one operation; raises HostFailure naming rank, step and peer."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failure(error, peer, step) from error

    def _failure(self, error: RuntimeError, peer: int, step: str) -> HostFailure:
        return HostFailure(str(error).splitlines()[0], rank=self.rank, step=step, peer=peer)

    def relay_stream(self) -> torch.cuda.Stream:
        """Return the stream that relays run on."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream
