"""A transport over torch.distributed: gloo on CPU, NCCL on GPU.

On GPUs nothing here makes the host wait. NCCL runs every message on a stream of its own, which begins when the stream
that posted it has come that far; a handle's ``wait`` makes the rank's stream, not its thread, wait for the message. A
buffer is made on the rank's stream and given back there, after such a wait: no message uses its memory any more, and no
stream has to be recorded with the allocator. ``docs/gpu.md`` has the whole account.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from burst.errors import HostFailure, UserError
from burst.transport.base import Handle, Message, Transport, TransportObserver


class _ExchangeHandle(Handle):
    """Point-to-point operations of one exchange."""

    def __init__(self, transport: ProcessGroupTransport, works: list[tuple[dist.Work, Message]], step: str) -> None:
        self._transport, self._works, self._step = transport, works, step

    def wait(self) -> None:
        t = self._transport
        t._observe("wait", self._step, -1)
        with t.waiting():
            for work, message in self._works:
                t.finish(work, message.peer, self._step)
        self._works = []


class _RelayHandle(Handle):
    """Receives that are forwarded as they arrive: by a thread on CPU, by a side stream on GPU."""

    def __init__(
        self,
        transport: ProcessGroupTransport,
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


class ProcessGroupTransport(Transport):
    """One rank of a torch.distributed group; call ``connect`` in each process, ``close`` at the end.

    Every operation ends within ``timeout_s`` or raises HostFailure naming rank, step and peer.
    """

    def __init__(
        self,
        *,
        nodes: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float = 600.0,
        observer: TransportObserver | None = None,
    ) -> None:
        super().__init__(
            dist.get_rank(), dist.get_world_size(), nodes=nodes, device=device, timeout_s=timeout_s, observer=observer
        )
        self.on_gpu = dist.get_backend() == "nccl"
        if not self.on_gpu and self.device.type != "cpu":
            raise UserError(
                "gloo groups hold their tensors on the CPU",
                given=f"gloo with device {self.device}",
                allowed="gloo with cpu, nccl with cuda",
                remedy="Set device=cpu, or give every host its own GPU, or use cluster=virtual on one GPU.",
            )
        # Relays run beside the rank's own exchanges: their own communicator keeps the two orders apart.
        self._relay_group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        self._stream: torch.cuda.Stream | None = None
        self._channels: dict[str, dist.ProcessGroup | None] = {}
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @classmethod
    def connect(
        cls,
        rank: int,
        world: int,
        address: tuple[str, int],
        *,
        nodes: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float = 600.0,
        observer: TransportObserver | None = None,
    ) -> ProcessGroupTransport:
        """Join the group whose rank 0 listens at ``address`` (host, port); nccl for cuda devices, gloo otherwise."""
        deadline = timedelta(seconds=timeout_s)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address[0], address[1], world, is_master=rank == 0, timeout=deadline
            )
        except (RuntimeError, dist.DistError) as error:
            where = f"{address[0]}:{address[1]}"
            raise HostFailure(f"could not join the group at {where}: {error}", rank=rank, step="connect") from error
        return cls.join(rank, world, store, nodes=nodes, device=device, timeout_s=timeout_s, observer=observer)

    @classmethod
    def join(
        cls,
        rank: int,
        world: int,
        store: dist.Store,  # type: ignore[name-defined]
        *,
        nodes: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float = 600.0,
        observer: TransportObserver | None = None,
    ) -> ProcessGroupTransport:
        """Join the group that meets at ``store``; raises HostFailure when that fails."""
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        deadline = timedelta(seconds=timeout_s)
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=deadline)
            return cls(nodes=nodes, device=device, timeout_s=timeout_s, observer=observer)
        except (RuntimeError, dist.DistError) as error:
            raise HostFailure(f"could not join the group: {error}", rank=rank, step="connect") from error

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()

    def _relay(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, forward_to: int | None
    ) -> Handle:
        return _RelayHandle(self, sends, recvs, kind, step, forward_to)

    def agree_once(self, text: str, *, step: str, here: str = "") -> None:
        # gloo ends the whole process when a message is longer than its receiver expects, before anyone can raise.
        # So its ranks compare every time; NCCL's compare once, because reading the answer stops the device.
        if self.on_gpu:
            super().agree_once(text, step=step, here=here)
        else:
            self.agree(text, step=step, here=here)

    def open(self, channels: Sequence[str]) -> None:
        # A communicator a channel, and so a stream of its own, on NCCL; gloo's operations do not wait for each other.
        for name in channels if self.on_gpu else ():
            if name not in self._channels:
                group = dist.new_group(timeout=timedelta(seconds=self.timeout_s))
                # A communicator's first call must involve all its ranks, or NCCL waits for those that are left out.
                dist.all_reduce(torch.zeros(1, device=self.device), group=group)
                self._channels[name] = group

    def _exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, channel: str
    ) -> Handle:
        for m in sends:
            self._record(m.peer, m.tensor, kind)
        group = self._channels.get(channel)
        ops = [dist.P2POp(dist.irecv, m.tensor, m.peer, group) for m in recvs]
        ops += [dist.P2POp(dist.isend, m.tensor, m.peer, group) for m in sends]
        messages = [*recvs, *sends]
        if not ops:
            return _ExchangeHandle(self, [], step)
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            raise self._failure(error, messages[0].peer, step) from error
        # NCCL may answer one work for the whole batch.
        return _ExchangeHandle(self, list(zip(works, messages, strict=False)), step)

    def settle(self) -> None:
        while self._stalls:
            self._settle_first()

    def _settle_first(self) -> None:
        begun, ended = self._stalls.popleft()
        self.waited_s += begun.elapsed_time(ended) / 1000

    # -- for handles --------------------------------------------------------------------------------------------

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting: the thread's, or on GPUs the stream's, which is known once it is done."""
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
