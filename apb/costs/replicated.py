"""One layer that every host keeps alike, a window or a recurrence, as steps of all hosts at once."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from apb.costs.lockstep import Await, ClockStep, Exchange, Hosts, HostWork, Move, Seconds, shift
from apb.costs.rates import Rates, read
from apb.layers.base import LayerKind
from apb.layers.sharding import Sharding
from apb.plan.plan import PrefillPlan

CALLS = 2  # kernel calls of a stretch, at most: before what arrived, and on it
AFTER = ("state",)  # messages that hold what the work gave; the others come before it


def mixing(plan: PrefillPlan, kind: LayerKind, rates: Rates) -> list[ClockStep]:
    """Return what a layer of this kind does after its projections, anchors included."""
    segments = [plan.segments(rank) for rank in range(plan.hosts)]
    flops = np.array([sum(kind.flops(part.sharding, rank) for part in own) for rank, own in enumerate(segments)])
    calls = np.array([CALLS * len(own) for own in segments])
    work = HostWork({kind.part: flops / read(rates.full, kind.width) + rates.call_s * calls})
    if plan.hosts == 1:
        return [work]
    # An anchor that every host runs by itself sends nothing, so one host's are all that send.
    sent = [(part.sharding, part.kept) for part in segments[0]]
    before, after = _exchange("before", plan, kind, sent), _exchange("after", plan, kind, sent)
    return [*before, work, *after]


def _exchange(when: str, plan: PrefillPlan, kind: LayerKind, sequences: list[tuple[Sharding, bool]]) -> list[ClockStep]:
    """The messages of all hosts before, or after, the work."""
    hosts, by_distance = plan.hosts, defaultdict[int, Seconds](lambda: np.zeros(plan.hosts))
    for sharding, kept in sequences:
        for rank in range(hosts):
            for name, peers in kind.messages(sharding, rank, plan.shape.element_size, kept).items():
                if (name in AFTER) == (when == "after"):
                    for peer, size in peers.items():
                        by_distance[(peer - rank) % hosts][rank] += size
    if not by_distance:
        return []
    return [Exchange(when, tuple(_move(hosts, k, by_distance[k]) for k in sorted(by_distance))), Await(when)]


def _move(hosts: int, by: int, sizes: Seconds) -> Move:
    def size(source: Hosts, _: Hosts) -> Seconds:
        found: Seconds = sizes[source]
        return found

    return shift(hosts, by, size)
