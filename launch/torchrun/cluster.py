"""One host in each of the processes that torchrun started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apb.clusters.outcome import Outcome, values
from apb.host.host import Host
from apb.host.messages import HostSpec, OnEvent
from burst.errors import HostFailure, UserError
from burst.transport import VirtualWorld
from launch.torchrun.ranks import Call, Drop, ranks


class TorchrunCluster:
    """One host in each of torchrun's processes, or a single one in rank 0 while the others idle.

    Every rank may make one: it returns on rank 0 only; the others serve and then end their process. Raises
    UserError in a process that torchrun did not start, and for another number of hosts.
    """

    name = "torchrun"

    def __init__(self, spec: HostSpec, hosts: int) -> None:
        self._ranks = ranks()
        if self._ranks.rank:
            self._ranks.follow()
            raise SystemExit(0)
        world = self._ranks.world
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
            here = self._ranks.local(spec)
            self._alone = Host(here, VirtualWorld(1, device=here.device).transports[0])
        else:
            self._take()
            try:
                self._settle("start", self._ranks.start(spec))
            except BaseException:
                self.close()
                raise

    def call(self, method: str, per_host: Sequence[tuple[Any, ...]], on_event: OnEvent | None = None) -> list[Any]:
        """Run one method on every host; raises a host's UserError, or a HostFailure that names the host."""
        assert not self._closed, "the cluster is closed"
        if self._alone is not None:
            self._alone.on_event = on_event or (lambda event: None)
            return [getattr(self._alone, method)(*per_host[0])]
        if not self._ranks.fit:
            self._settle("start", self._ranks.start(self._spec))
        commands = [Call(method, args) for args in per_host]
        try:
            return self._settle(method, self._ranks.command(commands, on_event))
        finally:
            self.epoch += not self._ranks.fit

    def close(self) -> None:
        """Forget the hosts; the processes stay for the next cluster. May be called twice."""
        if not self._closed:
            self._closed = True
            if self._alone is None:
                self._ranks.taken = False
                if self._ranks.fit:
                    self._ranks.command([Drop()] * self.hosts)
            self._alone = None

    def _take(self) -> None:
        if self._ranks.taken:
            raise UserError(
                "each of torchrun's processes is one host, of one engine at a time",
                given="a second engine",
                allowed="one engine on all processes, and engines with hosts=1",
                remedy="Close the first engine before you launch the second.",
            )
        self._ranks.taken = True

    def _settle(self, step: str, outcomes: dict[int, Outcome]) -> list[Any]:
        """Return the results, or raise what explains that there are not all of them."""
        results = values(outcomes)
        silent = [r for r in range(self.hosts) if r not in outcomes]
        if silent:
            raise HostFailure("it does not answer", rank=silent[0], step=step)
        return results
