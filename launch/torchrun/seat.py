"""One rank's host: carries out commands, wherever they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from apb.clusters.outcome import Outcome, attempt
from apb.host.host import Host
from apb.host.load import load_adapter
from apb.host.messages import HostSpec, OnEvent
from apb.models.adapter import Adapter
from burst.errors import HostFailure, UserError
from burst.transport import Transport
from burst.transport.process_group import ProcessGroupTransport
from launch.hosts.meeting import join_store, stay_on_loopback
from launch.hosts.progress import Progress
from launch.torchrun.messages import Call, Command, Drop, Start
from launch.torchrun.place import Place


class Seat:
    """Holds the host between commands. ``on_step`` runs at every layer, token and message, and may raise."""

    def __init__(self, place: Place, on_step: Callable[[], None] = lambda: None) -> None:
        self.progress = Progress()
        self._place, self._on_step = place, on_step
        self._group = 0  # the process group joined last
        self._transport: Transport | None = None
        self._loaded: tuple[HostSpec, Adapter] | None = None
        self._host: Host | None = None
        self.own_store: TCPStore | None = None  # where the groups meet, on the rank that opened it

    def perform(self, command: Command, on_event: OnEvent | None = None) -> Outcome:
        """Carry out a command; after a failure peers that wait for this rank fail now and not at their deadline."""
        with self.progress.working():
            outcome = attempt(lambda: self._obey(command, on_event))
        if outcome.error is not None and not isinstance(command, Drop):
            self.disconnect()
        return outcome

    def joined(self, spec: HostSpec) -> bool:
        """Return True where the process group is there, and of this spec's kind."""
        t = self._transport
        return t is not None and t.timeout_s == spec.timeout_s and t.device.type == spec.device.split(":")[0]

    def local(self, spec: HostSpec) -> HostSpec:
        """Return the spec with this process's own GPU; raises UserError when there is none for it."""
        if not spec.device.startswith("cuda"):
            return spec
        count, mine = torch.cuda.device_count(), self._place.local_rank
        if mine >= count:
            raise UserError(
                "every host needs its own GPU",
                given=f"{mine + 1} or more processes on a machine with {count} GPUs",
                allowed=f"up to {count} processes a machine",
                remedy=f"Run torchrun with --nproc-per-node={max(1, count)}, or set cluster=virtual.",
            )
        torch.cuda.set_device(mine)
        return dataclasses.replace(spec, device=f"cuda:{mine}")

    def disconnect(self) -> None:
        """Leave the process group."""
        self._host = self._transport = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _obey(self, command: Command, on_event: OnEvent | None) -> Any:
        match command:
            case Start():
                self._start(command)
            case Call(method, args):
                if self._host is None:
                    raise HostFailure("this host did not start", rank=self._place.rank, step=method)
                assert not method.startswith("_"), f"{method} is not for other processes"
                self._host.on_event = lambda event: self._on_event(event, on_event)
                return getattr(self._host, method)(*args)
            case Drop():
                self._host = self._loaded = None
        return None

    def _on_event(self, event: dict[str, Any], on_event: OnEvent | None) -> None:
        self._step()
        if on_event is not None:
            on_event(event)

    def _step(self, *_: object) -> None:
        self.progress.step()
        self._on_step()

    def _start(self, start: Start) -> None:
        spec, place = self.local(start.spec), self._place
        if start.group != self._group or self._transport is None:
            self.disconnect()
            self._group = start.group
            if place.local:
                stay_on_loopback()
            store = self.own_store or join_store(place.address, start.port, place.world, spec.timeout_s)
            self._transport = ProcessGroupTransport.join(
                place.rank,
                place.world,
                PrefixStore(f"group/{start.group}", store),
                nodes=start.nodes,
                device=spec.device,
                timeout_s=spec.timeout_s,
                observer=self._step,
            )
        if self._loaded is None or self._loaded[0] != spec:
            self._host = self._loaded = None  # not two models at a time
            self._loaded = (spec, load_adapter(spec))
        self._host = Host(spec, self._transport, self._loaded[1])
