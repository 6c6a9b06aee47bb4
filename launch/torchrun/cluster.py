"""One host in each of the processes that torchrun started."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from apb.clusters.outcome import Outcome, values
from apb.host.host import Host
from apb.host.messages import HostSpec, OnEvent
from burst.errors import HostFailure, UserError
from burst.transport import VirtualWorld
from launch.terminal.interrupt import handled
from launch.torchrun.leader import Leader
from launch.torchrun.messages import Call, Drop
from launch.torchrun.ranks import ranks


class TorchrunCluster:
    """One host in each of torchrun's processes, or a single one in rank 0 while the others idle.

    Every rank may make one: it returns on rank 0 only; the others serve and then end their process. Raises
    UserError in a process that torchrun did not start, and for another number of hosts.
    """

    name = "torchrun"

    def __init__(self, spec: HostSpec, hosts: int) -> None:
        self._ranks = ranks()
        if self._ranks.follower is not None:
            raise SystemExit(self._ranks.follower.follow())
        assert self._ranks.leader is not None
        self._leader: Leader = self._ranks.leader
        world = self._ranks.place.world
        if hosts not in (1, world):
            raise UserError(
                f"torchrun started {world} processes, {hosts} hosts asked",
                given=f"cluster.hosts={hosts}",
                allowed=f"{world}, or 1" if world > 1 else "1",
                remedy=f"Run torchrun with --nproc-per-node={hosts}, or set cluster.hosts={world}.",
            )
        self.hosts, self.epoch = hosts, 0
        self._spec, self._closed = spec, False
        self._alone: Host | None = None
        if hosts == 1:
            # Its own world of one rank: a call runs in the caller's thread, and no other process is in it.
            here = self._leader.seat.local(spec)
            self._leader.allow(spec.timeout_s)
            with self._leader.seat.progress.working():
                self._alone = Host(here, VirtualWorld(1, device=here.device).transports[0])
        else:
            self._take()
            try:
                self._settle("start", lambda: self._leader.start(spec))
            except BaseException:
                self.close()
                raise

    def call(self, method: str, per_host: Sequence[tuple[Any, ...]], on_event: OnEvent | None = None) -> list[Any]:
        """Run one method on every host; raises a host's UserError, or a HostFailure that names the host."""
        assert not self._closed, "the cluster is closed"
        if self._alone is not None:
            return self._call_alone(method, per_host[0], on_event)
        if not self._leader.fit:
            self._settle("start", lambda: self._leader.start(self._spec))
        commands = [Call(method, args) for args in per_host]
        try:
            return self._settle(method, lambda: self._leader.command(commands, on_event))
        finally:
            self.epoch += not self._leader.fit

    def close(self) -> None:
        """Forget the hosts; the processes stay for the next cluster. May be called twice."""
        if not self._closed:
            self._closed = True
            if self._alone is None:
                self._ranks.taken = False
                if self._leader.fit:
                    self._leader.command([Drop()] * self.hosts)
            self._alone = None

    def _call_alone(self, method: str, args: tuple[Any, ...], on_event: OnEvent | None) -> list[Any]:
        progress, host = self._leader.seat.progress, self._alone
        assert host is not None

        def heard(event: dict[str, Any]) -> None:
            progress.step()
            if on_event is not None:
                on_event(event)

        host.on_event = heard
        with progress.working():
            return [getattr(host, method)(*args)]

    def _take(self) -> None:
        if self._ranks.taken:
            raise UserError(
                "each of torchrun's processes is one host, of one engine at a time",
                given="a second engine",
                allowed="one engine on all processes, and engines with hosts=1",
                remedy="Close the first engine before you launch the second.",
            )
        self._ranks.taken = True

    def _settle(self, step: str, run: Callable[[], dict[int, Outcome]]) -> list[Any]:
        """Return the results, or raise what explains that there are not all of them."""
        leader = self._leader
        try:
            outcomes = run()
        except KeyboardInterrupt:
            if not leader.lost:
                raise
            handled()  # torchrun ends this process because another one ended: that is what there is to tell
            outcomes = {}
        if leader.lost:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the time that telling takes
            own = [o.error for o in outcomes.values() if isinstance(o.error, HostFailure) and o.error.peer is not None]
            witness = next((error for error in own if error.peer in leader.lost), None)
            failure = leader.failure(witness.step if witness is not None else step)
            if witness is not None:
                failure.peer = witness.rank
            raise failure
        results = values(outcomes)
        silent = [r for r in range(self.hosts) if r not in outcomes]
        if silent:
            raise HostFailure("it does not answer", rank=silent[0], step=step)
        return results
