"""Hosts as Ray actors, on this machine or on a cluster of them."""

from __future__ import annotations

import atexit
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from apb.clusters.outcome import Outcome, intact, values
from apb.host.host import HostSpec, OnEvent
from burst.errors import HostFailure
from launch.ray.actor import HostActor
from launch.ray.session import Placement, close_session, load_ray, open_session, place

TICK_S = 0.5  # how often a call that nothing comes from looks up
# A dead process is known after at most two seconds, its neighbours fail at once, and theirs after them.
GRACE_S = 5.0


class RayCluster:
    """One actor a host. A host that dies ends the others; the next call starts all of them again.

    Raises UserError without Ray, without a cluster at ``address``, or without room for the hosts on it. Start
    it from a thread that stays: Linux ends a Ray that was started here together with the thread that did.
    """

    name = "ray"

    def __init__(
        self, spec: HostSpec, hosts: int, *, address: str | None = None, startup_timeout_s: float = 120.0
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
        return self._settle(method, refs, number, on_event)

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
            self.pids = tuple(self._answer(rank, ref, deadline) for rank, ref in enumerate(asked))
            listening = self._actors[0].listen.remote(at.address, self.hosts, self._spec.timeout_s)
            port = self._answer(0, listening, deadline)
        except BaseException:
            self._end_hosts()
            raise
        refs = [actor.start.remote(self._spec, at.nodes, at.address, port) for actor in self._actors]
        self._settle("start", refs)

    def _actor(self, rank: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self._placement is not None
        remote = self._ray.remote(concurrency_groups={"control": 1})(HostActor)
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
        try:
            return self._ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except self._ray.exceptions.GetTimeoutError as error:
            raise HostFailure(
                f"its process did not start within {self._startup_timeout_s:.0f} s", rank=rank, step="start"
            ) from error
        except self._ray.exceptions.RayError as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1].strip()
            raise HostFailure(f"its process could not start: {last}", rank=rank, step="start") from error

    def _end_hosts(self) -> None:
        """Kill every host's process; one that waits for a peer would answer nothing else."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self.pids = [], ()

    # -- waiting -------------------------------------------------------------------------------------------

    def _settle(self, method: str, refs: list[Any], number: int = -1, on_event: OnEvent | None = None) -> list[Any]:
        """Wait for a call on all hosts; when it leaves them unfit for another, end them."""
        waiting = _Call(self._ray, refs)
        fit = False
        try:
            if on_event is not None:
                control = self._actors[0].events.options(concurrency_group="control")
                waiting.stream(lambda: control.remote(number), on_event)
            waiting.until_settled()
            fit = intact(waiting.outcomes, self.hosts)
            failure = None if fit else waiting.failure(method)
            if failure is not None:
                raise failure
            return values(waiting.outcomes)
        finally:
            if not fit:
                self._end_hosts()
                self.epoch += 1


class _Call:
    """One call under way on all hosts: what came back, who died, and the events of host 0."""

    def __init__(self, ray: Any, refs: list[Any]) -> None:
        self._ray = ray
        self._pending = {ref: rank for rank, ref in enumerate(refs)}
        self._dead: dict[int, str] = {}
        self._step = ""  # the last thing host 0 was heard to do
        self._events: Any = None
        self.outcomes: dict[int, Outcome] = {}

    def stream(self, ask: Callable[[], Any], on_event: OnEvent) -> None:
        """Hand host 0's events on while waiting; ``ask()`` requests the next ones."""
        self._ask, self._on_event, self._events = ask, on_event, ask()

    def until_settled(self) -> None:
        """Wait for every host, or, once one failed, for what its peers have to say about it."""
        give_up = math.inf
        while self._pending or self._events is not None:
            waited = [*self._pending, *([] if self._events is None else [self._events])]
            ready, _ = self._ray.wait(waited, num_returns=1, timeout=TICK_S)
            for ref in ready:
                if ref is self._events:
                    self._deliver(ref)
                else:
                    self._receive(self._pending.pop(ref), ref)
            failed = self._dead or any(outcome.error for outcome in self.outcomes.values())
            if failed and give_up == math.inf:
                give_up = time.monotonic() + GRACE_S
            if time.monotonic() > give_up or (self._dead and self._witnesses(self._dead)):
                return

    def failure(self, method: str) -> HostFailure | None:
        """Return the failure of a host that died, or is silent while its peers name it; None if none is."""
        silent = dict.fromkeys(self._pending.values(), "it does not answer; its peers gave up after waiting for it")
        explained = any(o.error and not isinstance(o.error, HostFailure) for o in self.outcomes.values())
        lost = self._dead or ({} if explained else silent)
        witnesses = self._witnesses(lost)
        if not witnesses and not self._dead:
            return None
        others = [o.error for o in self.outcomes.values() if isinstance(o.error, HostFailure)]
        witness = next(iter(witnesses or others), None)
        rank = witness.peer if witness is not None and witness.peer in lost else min(lost)
        step = witness.step if witness is not None else self._step or method
        return HostFailure(lost[rank], rank=rank, step=step, peer=witness.rank if witness is not None else None)

    def _witnesses(self, lost: dict[int, str]) -> list[HostFailure]:
        errors = [o.error for o in self.outcomes.values()]
        return [e for e in errors if isinstance(e, HostFailure) and e.peer in lost]

    def _receive(self, rank: int, ref: Any) -> None:
        try:
            self.outcomes[rank] = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # the actor's own code: a bug of ours
            self.outcomes[rank] = Outcome(error=RuntimeError(str(error)))
        except self._ray.exceptions.OutOfMemoryError:
            self._dead[rank] = "its process was ended by Ray because its machine ran out of memory"
        except self._ray.exceptions.RayError:
            self._dead[rank] = "its process ended: killed, out of memory, or crashed"

    def _deliver(self, ref: Any) -> None:
        try:
            events, last = self._ray.get(ref)
        except self._ray.exceptions.RayError:  # host 0 is gone; its call says so
            self._events = None
            return
        self._events = None if last else self._ask()
        for event in events:
            self._step = self._describe(event)
            self._on_event(event)

    @staticmethod
    def _describe(event: dict[str, Any]) -> str:
        return f"after layer {event['done'] - 1}" if event.get("kind") == "layer" else str(event.get("kind"))
