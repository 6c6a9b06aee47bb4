"""Programs of work and messages as data, and the times at which they happened.

Programs come from schedules (``burst.planner.predict``) or from a recorded transport (``burst.planner.trace``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

# as the calls stand; every call waited for at once; messages that cost nothing
Overlap = Literal["ordered", "none", "full"]


class Busy(NamedTuple):
    """Own work between two calls; ``parts`` are some of the seconds by purpose."""

    seconds: float
    parts: tuple[tuple[str, float], ...] = ()


class Begin(NamedTuple):
    """Sends and receives, (peer, bytes) each, started together; messages between two ranks keep their order.

    ``forward_to``: every receive is sent on to this rank as soon as it has arrived, without the caller.
    """

    name: int
    sends: tuple[tuple[int, int], ...]
    recvs: tuple[tuple[int, int], ...]
    forward_to: int | None = None
    label: str = ""


class Finish(NamedTuple):
    """Wait until the start of that name has received and sent everything."""

    name: int


TimelineEvent = Busy | Begin | Finish


class Activity(NamedTuple):
    """A rank's work or wait from ``start`` to ``stop``, in seconds."""

    start: float
    stop: float
    what: Literal["work", "wait"]
    label: str


@dataclass(frozen=True)
class Timeline:
    """Seconds by rank: its end, its work, the load of its ports, and its activities."""

    ends: tuple[float, ...]
    work_s: tuple[float, ...]
    port_s: tuple[float, ...]  # its busiest port, by link class and direction
    spans: tuple[tuple[Activity, ...], ...]

    @property
    def total_s(self) -> float:
        """Seconds until the last rank is done."""
        return max(self.ends)

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Seconds that each rank does not work before the last one is done."""
        return tuple(self.total_s - work for work in self.work_s)


@dataclass(frozen=True)
class Interval:
    """One set of programs with all, the ordered, and no communication hidden.

    ``best_s``: messages cost nothing, but are waited for, and no port is busy for longer. ``exposed_s``: what messages
    add to the makespan as ordered.
    """

    best_s: float
    ordered: Timeline
    worst_s: float
    exposed_s: float
