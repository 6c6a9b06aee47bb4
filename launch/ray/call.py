"""One call under way on Ray's hosts: results, deaths, silence, and what of it all explains a failure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from apb.clusters.outcome import Outcome
from apb.host.messages import OnEvent
from burst.errors import HostFailure
from launch.hosts.vigil import Vigil, beat_s

TICK_S = 0.5  # how often a call that nothing comes from looks up
# A dead process is known after at most two seconds, its neighbours fail at once, and theirs after them.
GRACE_S = 5.0
SILENT_GRACE_S = 1.0  # who waits for a silent host has had as long as the driver, and fails now or not at all


class Call:
    """One call under way: what came back, who died, who is silent, and the events of host 0.

    ``refs`` are the answers that are due, by rank; ``beating(rank, after_s)`` asks a host for its next beat.
    """

    def __init__(self, ray: Any, refs: dict[int, Any], beating: Callable[[int, float], Any], timeout_s: float) -> None:
        self._ray = ray
        self._pending = {ref: rank for rank, ref in refs.items()}
        self._beating, self._beat_s = beating, beat_s(timeout_s)
        self._beats = {beating(rank, 0.0): rank for rank in refs}
        self._vigil = Vigil(refs.keys(), timeout_s)
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
            waited = [*self._pending, *self._beats, *([] if self._events is None else [self._events])]
            ready, _ = self._ray.wait(waited, num_returns=1, timeout=TICK_S)
            for ref in ready:
                if ref is self._events:
                    self._deliver(ref)
                elif ref in self._beats:
                    self._hear(self._beats.pop(ref), ref)
                else:
                    self._receive(self._pending.pop(ref), ref)
            now = time.monotonic()
            lost = self._vigil.lost(self._pending.values())
            if lost and not self._dead:
                give_up = min(give_up, now + SILENT_GRACE_S)
            self._dead |= {rank: text for rank, text in lost.items() if rank not in self._dead}
            failed = self._dead or any(outcome.error for outcome in self.outcomes.values())
            if failed and give_up == math.inf:
                give_up = now + GRACE_S
            if now > give_up or (self._dead and self._witnesses(self._dead)):
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
        also = [other for other in sorted(lost) if other != rank and lost[other][:10] == lost[rank][:10]]
        text = f"{lost[rank]} (so are hosts {also})" if also else lost[rank]
        return HostFailure(text, rank=rank, step=step, peer=witness.rank if witness is not None else None)

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

    def _hear(self, rank: int, ref: Any) -> None:
        """Note a beat and ask for the next one."""
        try:
            self._vigil.heard(rank, self._ray.get(ref))
        except self._ray.exceptions.RayError:  # its process is gone; its call says so
            return
        if rank in self._pending.values():
            self._beats[self._beating(rank, self._beat_s)] = rank

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
