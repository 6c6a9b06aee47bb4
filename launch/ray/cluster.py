"""Hosts as Ray actors, on this machine or on a cluster of them."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from apb.clusters.outcome import intact, values
from apb.host.messages import HostSpec, OnEvent
from burst.errors import HostFailure
from launch.ray.actor import HostActor
from launch.ray.call import Call
from launch.ray.places import Placement, place
from launch.ray.session import close_session, load_ray, open_session

FIRST_S = 20.0  # at least, for a process that has room to say that it is there


class RayCluster:
    """One actor a host. A host that dies ends the others; the next call starts all of them again.

    Raises UserError without Ray, without a cluster at ``address``, or without room for the hosts on it. Start
    it from a thread that stays: Linux ends a Ray that was started here together with the thread that did.
    """

    name = "ray"

    def __init__(
        self, spec: HostSpec, hosts: int, *, address: str | None = None, startup_timeout_s: float = 180.0
    ) -> None:
        self.hosts, self.epoch = hosts, 0
        self._spec, self._startup_timeout_s = spec, startup_timeout_s
        self._on_gpu = spec.device.startswith("cuda")
        self._numbers = itertools.count()
        self._actors: list[Any] = []
        self._placement: Placement | None = None
        self.pids: tuple[int, ...] = ()  # of the hosts' processes, by rank
        self._closed = False
        self._ray = load_ray()
        self._session = open_session(address, hosts)
        atexit.register(self.close)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, per_host: Sequence[tuple[Any, ...]], on_event: OnEvent | None = None) -> list[Any]:
        """Run one method on every host; raises a host's UserError, or a HostFailure that names the host."""
        assert not self._closed, "the cluster is closed"
        if not self._actors:
            self._start()
        number = next(self._numbers)
        refs = [
            actor.run.remote(number if on_event and rank == 0 else None, method, per_host[rank])
            for rank, actor in enumerate(self._actors)
        ]
        return self._settle(method, dict(enumerate(refs)), number, on_event)

    def close(self) -> None:
        """End all hosts, and Ray if it was started or joined for them; may be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._ray.is_initialized():
            self._end_hosts()
            if self._placement is not None:
                self._placement.remove()
        if self._session:
            close_session()

    # -- starting and ending -------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start an actor a host, let them meet, and load the model on each."""
        deadline = time.monotonic() + self._startup_timeout_s
        while True:
            try:
                return self._start_once(deadline)
            except HostFailure:
                # Ray takes a while to see that a machine is gone, and places hosts on it until then.
                if self._placement is None or self._placement.alive or time.monotonic() > deadline:
                    raise

    def _start_once(self, deadline: float) -> None:
        if self._placement is None or not self._placement.alive:
            if self._placement is not None:
                self._placement.remove()
                self._placement = None
            self._placement = place(self.hosts, self._on_gpu, max(1.0, deadline - time.monotonic()))
        at = self._placement
        try:
            self._actors = [self._actor(rank) for rank in range(self.hosts)]
            asked = [actor.pid.remote() for actor in self._actors]
            soon = min(deadline, time.monotonic() + max(FIRST_S, self._spec.timeout_s))
            self.pids = tuple(self._answer(rank, ref, soon) for rank, ref in enumerate(asked))
        except BaseException:
            self._end_hosts()
            raise
        first, *others = self._actors
        refs = [first.listen.remote(at.address, self.hosts, self._spec.timeout_s)]
        port, *_ = self._settle("start", dict(enumerate([*refs, *(actor.prepare.remote() for actor in others)])))
        refs = [actor.start.remote(self._spec, at.nodes, at.address, port) for actor in self._actors]
        self._settle("start", dict(enumerate(refs)))

    def _actor(self, rank: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self._placement is not None
        remote = self._ray.remote(concurrency_groups={"control": 1, "pulse": 1})(HostActor)
        return remote.options(
            num_cpus=1,
            num_gpus=1 if self._on_gpu else 0,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._spec.threads)}},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._placement.group, placement_group_bundle_index=self._placement.bundles[rank]
            ),
        ).remote(rank)

    def _answer(self, rank: int, ref: Any, deadline: float) -> Any:
        began = time.monotonic()
        try:
            return self._ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except self._ray.exceptions.GetTimeoutError as error:
            raise HostFailure(
                f"its process did not start within {time.monotonic() - began:.0f} s", rank=rank, step="start"
            ) from error
        except self._ray.exceptions.RayError as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1].strip()
            raise HostFailure(f"its process could not start: {last}", rank=rank, step="start") from error

    def _end_hosts(self) -> None:
        """Kill every host's process; one that waits for a peer would answer nothing else."""
        for actor in self._actors:
            self._ray.kill(actor)
        for rank, pid in enumerate(self.pids):  # Ray asks a process to end, which one that is stopped never does
            if self._placement is not None and self._placement.is_here(rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._actors, self.pids = [], ()

    # -- waiting -------------------------------------------------------------------------------------------

    def _settle(
        self, method: str, refs: dict[int, Any], number: int = -1, on_event: OnEvent | None = None
    ) -> list[Any]:
        """Wait for a call on hosts; when it leaves them unfit for another, end them."""
        actors = self._actors

        def beating(rank: int, after_s: float) -> Any:
            return actors[rank].beat.options(concurrency_group="pulse").remote(after_s)

        fit = False
        try:
            waiting = Call(self._ray, refs, beating, self._spec.timeout_s)
            if on_event is not None:
                control = actors[0].events.options(concurrency_group="control")
                waiting.stream(lambda: control.remote(number), on_event)
            waiting.until_settled()
            fit = intact(waiting.outcomes, len(refs))
            failure = None if fit else waiting.failure(method)
            if failure is not None:
                raise failure
            return values(waiting.outcomes)
        finally:
            if not fit:
                self._end_hosts()
                self.epoch += 1
