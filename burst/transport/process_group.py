"""A transport over torch.distributed: gloo on CPU, NCCL on GPU."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Unpack

import torch
import torch.distributed as dist

from burst.errors import HostFailure
from burst.transport.base import DEADLINE_S, Handle, Message, TransportOptions
from burst.transport.handles import ExchangeHandle, RelayHandle
from burst.transport.operations import GroupOperations


class ProcessGroupTransport(GroupOperations):
    """One rank of a torch.distributed group; call ``connect`` in each process, ``close`` at the end.

    Every operation ends within ``timeout_s`` or raises HostFailure naming rank, step and peer.
    """

    def __init__(self, **options: Unpack[TransportOptions]) -> None:
        super().__init__(**options)
        self._channels: dict[str, dist.ProcessGroup | None] = {}

    @classmethod
    def connect(
        cls, rank: int, world: int, address: tuple[str, int], **options: Unpack[TransportOptions]
    ) -> ProcessGroupTransport:
        """Join the group whose rank 0 listens at ``address`` (host, port); nccl for cuda devices, gloo otherwise."""
        deadline = timedelta(seconds=options.get("timeout_s", DEADLINE_S))
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address[0], address[1], world, is_master=rank == 0, timeout=deadline
            )
        except (RuntimeError, dist.DistError) as error:
            where = f"{address[0]}:{address[1]}"
            raise HostFailure(f"could not join the group at {where}: {error}", rank=rank, step="connect") from error
        return cls.join(rank, world, store, **options)

    @classmethod
    def join(
        cls,
        rank: int,
        world: int,
        store: dist.Store,  # type: ignore[name-defined]
        **options: Unpack[TransportOptions],
    ) -> ProcessGroupTransport:
        """Join the group that meets at ``store``; raises HostFailure when that fails."""
        backend = "nccl" if torch.device(options.get("device", "cpu")).type == "cuda" else "gloo"
        deadline = timedelta(seconds=options.get("timeout_s", DEADLINE_S))
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=deadline)
            return cls(**options)
        except (RuntimeError, dist.DistError) as error:
            raise HostFailure(f"could not join the group: {error}", rank=rank, step="connect") from error

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()

    def _relay(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, forward_to: int | None
    ) -> Handle:
        return RelayHandle(self, sends, recvs, kind, step, forward_to)

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
                # Any: torch 2.14 declares a number as well, for ranks outside the group, of which there are none here.
                group: Any = dist.new_group(timeout=timedelta(seconds=self.timeout_s))
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
            return ExchangeHandle(self, [], step)
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            raise self._failure(error, messages[0].peer, step) from error
        # NCCL may answer one work for the whole batch.
        return ExchangeHandle(self, list(zip(works, messages, strict=False)), step)
