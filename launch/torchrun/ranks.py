"""The processes that torchrun started: rank 0 runs the program and commands, the others follow."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import pickle
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
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

SLICE_S = 1.0  # how long one look at the store waits; between two looks signals are heard
MEET_S = 300.0  # all processes must have come up by then
LEAVE_S = 3.0  # for the others to leave before rank 0 does
GRACE_S = 5.0  # for the others' answers once one has failed: their connections to it are closed


@dataclass(frozen=True)
class Start:
    """Join process group number ``group``, unless that is done, and load the model."""

    spec: HostSpec
    group: int


@dataclass(frozen=True)
class Call:
    """Run a method of the host."""

    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Drop:
    """Forget the host and its model."""


@dataclass(frozen=True)
class Stop:
    """End the process."""


Command = Start | Call | Drop | Stop


@functools.cache
def ranks() -> Ranks:
    """Return this process's place among torchrun's; raises UserError when torchrun did not start it.

    Also for an address at which the processes cannot meet, such as a busy port.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(
            "cluster 'torchrun' runs in processes that torchrun starts",
            given="cluster=torchrun in a process that torchrun did not start",
            allowed="torchrun, or cluster=ray or cluster=virtual, which start their hosts themselves",
            remedy="Run: torchrun --standalone --nproc-per-node=4 -m launch.torchrun ask -d FILE -q QUESTION",
        )
    try:
        return Ranks()
    except (ValueError, dist.DistError) as error:
        env = os.environ
        raise UserError(
            f"the processes cannot meet: {str(error).splitlines()[0]}",
            given=f"MASTER_ADDR={env['MASTER_ADDR']}, MASTER_PORT={env['MASTER_PORT']}",
            allowed="rank 0's machine, and a port of it that is free and that all processes reach",
            remedy="Choose another port (torchrun --master-port), or run torchrun with --standalone.",
        ) from error


class Ranks:
    """One of torchrun's processes.

    Commands and answers travel over torchrun's store, where waiting has no deadline: rank 0 may think long.
    """

    def __init__(self) -> None:
        env = os.environ
        self.rank, self.world = int(env["RANK"]), int(env["WORLD_SIZE"])
        self.fit = True  # whether the last command left the hosts ready for another
        self.taken = False  # whether a cluster stands on the ranks
        self._local_rank = int(env.get("LOCAL_RANK", "0"))
        kept_by_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            self.world,
            is_master=self.rank == 0 and not kept_by_agent,
            timeout=timedelta(seconds=MEET_S),
        )
        # A restarted program finds the store of the earlier one.
        self._store = PrefixStore(f"apb/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._store.set(f"node/{self.rank}", env.get("GROUP_RANK", "0"))
        self.nodes = tuple(int(self._store.get(f"node/{r}")) for r in range(self.world))
        self._number = 0  # of the command under way
        self._group = 0  # of the process group joined last
        self._transport: Transport | None = None
        self._loaded: tuple[HostSpec, Adapter] | None = None
        self._host: Host | None = None
        self._stopped = False
        if self.rank == 0:
            atexit.register(self.stop)
        if "TORCHELASTIC_RUN_ID" in env:  # otherwise the parent is a shell, which may well end first
            threading.Thread(target=_end_after_parent, args=(os.getppid(),), daemon=True).start()

    # -- rank 0 --------------------------------------------------------------------------------------------

    def start(self, spec: HostSpec) -> dict[int, Outcome]:
        """Load the model on all ranks, in a new process group if the old one is not fit."""
        group = self._group if self.fit and self._joined(spec) else self._group + 1
        return self.command([Start(spec, group)] * self.world)

    def command(self, commands: Sequence[Command], on_event: OnEvent | None = None) -> dict[int, Outcome]:
        """Have every rank do its part, this one in the caller's thread; return what came of it, by rank."""
        self._number += 1
        for rank in range(1, self.world):
            self._store.set(f"do/{self._number}/{rank}", pickle.dumps(commands[rank]))  # type: ignore[arg-type]
        if self._host is not None:
            self._host.on_event = on_event or (lambda event: None)
        self.fit = False  # unless all of them get to the end
        outcomes = {0: self._perform(commands[0])}
        timeout_s = self._transport.timeout_s if self._transport is not None else MEET_S
        self._collect(outcomes, timeout_s + GRACE_S)
        self.fit = len(outcomes) == self.world and not any(o.error for o in outcomes.values())
        return outcomes

    def stop(self) -> None:
        """Let the other ranks end; may be called twice."""
        if self._stopped:
            return
        self._stopped = True
        self._disconnect()
        with contextlib.suppress(dist.DistNetworkError):  # torchrun is gone already, and ends them
            self._number += 1
            for rank in range(1, self.world):
                self._store.set(f"do/{self._number}/{rank}", pickle.dumps(Stop()))  # type: ignore[arg-type]
            # Those still there when this one ends with an error would count as failed too.
            end = time.monotonic() + LEAVE_S
            gone = [f"gone/{rank}" for rank in range(1, self.world)]
            while gone and not self._wait(gone) and time.monotonic() < end:
                pass

    def _collect(self, outcomes: dict[int, Outcome], limit_s: float) -> None:
        key = {rank: f"done/{self._number}/{rank}" for rank in range(1, self.world)}
        end = time.monotonic() + limit_s
        while len(outcomes) < self.world and time.monotonic() < end:
            missing = [r for r in key if r not in outcomes]
            self._wait([key[r] for r in missing])
            for r in missing:
                if self._store.check([key[r]]):
                    outcomes[r] = pickle.loads(self._store.get(key[r]))
                    self._store.delete_key(key[r])
            if any(outcome.error for outcome in outcomes.values()):
                end = min(end, time.monotonic() + GRACE_S)

    # -- the others ----------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what rank 0 commands until it says stop or is gone."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a word; rank 0 has something to say
        while True:
            self._number += 1
            key = f"do/{self._number}/{self.rank}"
            try:
                while not self._wait([key]):
                    pass
                command: Command = pickle.loads(self._store.get(key))
                self._store.delete_key(key)
                if isinstance(command, Stop):
                    break
                outcome = self._perform(command)
                self._store.set(f"done/{self._number}/{self.rank}", pickle.dumps(outcome))  # type: ignore[arg-type]
            except dist.DistNetworkError:  # whoever kept the store is gone, and rank 0 with it
                return
        self._disconnect()
        self._store.set(f"gone/{self.rank}", "")

    # -- every rank ----------------------------------------------------------------------------------------

    def _wait(self, keys: list[str]) -> bool:
        """Wait for keys for a while; return whether all are there."""
        try:
            self._store.wait(keys, timedelta(seconds=SLICE_S))
        except dist.DistNetworkError:
            raise
        except dist.DistStoreError:
            return False
        return True

    def _perform(self, command: Command) -> Outcome:
        outcome = attempt(lambda: self._obey(command))
        if outcome.error is not None and not isinstance(command, Drop):
            self._disconnect()  # peers that wait for this rank fail now and not at their deadline
        return outcome

    def _obey(self, command: Command) -> Any:
        match command:
            case Start(spec, group):
                self._start(self.local(spec), group)
            case Call(method, args):
                if self._host is None:
                    raise HostFailure("this host did not start", rank=self.rank, step=method)
                return getattr(self._host, method)(*args)
            case Drop():
                self._host = self._loaded = None
        return None

    def local(self, spec: HostSpec) -> HostSpec:
        """Return the spec with this process's own GPU; raises UserError when there is none for it."""
        if not spec.device.startswith("cuda"):
            return spec
        count = torch.cuda.device_count()
        if self._local_rank >= count:
            raise UserError(
                "every host needs its own GPU",
                given=f"{self._local_rank + 1} or more processes on a machine with {count} GPUs",
                allowed=f"up to {count} processes a machine",
                remedy=f"Run torchrun with --nproc-per-node={max(1, count)}, or set cluster=virtual.",
            )
        torch.cuda.set_device(self._local_rank)
        return dataclasses.replace(spec, device=f"cuda:{self._local_rank}")

    def _start(self, spec: HostSpec, group: int) -> None:
        if group != self._group or self._transport is None:
            self._disconnect()
            self._group = group
            self._transport = ProcessGroupTransport.join(
                self.rank,
                self.world,
                PrefixStore(f"group/{group}", self._store),
                nodes=self.nodes,
                device=spec.device,
                timeout_s=spec.timeout_s,
            )
        if self._loaded is None or self._loaded[0] != spec:
            self._host = self._loaded = None  # not two models at a time
            self._loaded = (spec, load_adapter(spec))
        self._host = Host(spec, self._transport, self._loaded[1])

    def _joined(self, spec: HostSpec) -> bool:
        t = self._transport
        return t is not None and t.timeout_s == spec.timeout_s and t.device.type == spec.device.split(":")[0]

    def _disconnect(self) -> None:
        self._host = self._transport = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_after_parent(parent: int) -> None:
    """End this process soon after torchrun, which ends its processes itself unless it is killed."""
    while os.getppid() == parent:
        time.sleep(SLICE_S)
    os.kill(os.getpid(), signal.SIGTERM)
