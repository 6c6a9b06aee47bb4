"""Choice of a schedule by predicted time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from burst.errors import UserError
from burst.layouts.layout import Layout
from burst.planner.candidates import TIE, Candidate, Plan
from burst.planner.predict import predict
from burst.planner.topology import Topology
from burst.schedules import NAMES, AttentionShape, Phase, Schedule, schedule

PHASES: tuple[Phase, ...] = ("forward", "backward")
SIMPLEST = ("ring", "allgather", "burst", "double_ring", "usp", "ulysses")


@lru_cache(maxsize=256)
def plan(
    layout: Layout,
    shape: AttentionShape,
    topology: Topology,
    *,
    causal: bool = True,
    window: int | None = None,
    keys: Layout | None = None,
    backward: bool = False,
    travels: tuple[str, str] = ("auto", "auto"),
    names: tuple[str, ...] = NAMES,
) -> Plan:
    """Predict every schedule (or those of ``names``), fastest first; near ties go to the simpler one.

    ``travels``, forward and backward, is each schedule's own choice unless given (``schedules.schedule``).
    The result depends on the arguments alone, so all ranks choose alike. Raises UserError when none can run.
    """
    make = partial(schedule, layout=layout, shape=shape, nodes=topology.nodes, causal=causal, window=window, keys=keys)
    found = [_candidate(n, make, shape, topology, travels if backward else travels[:1]) for n in names]
    best = min(c.total_s for c in found)
    why = min(found, key=lambda c: SIMPLEST.index(c.name)).rejection
    if best == float("inf") and why is not None:
        message = f"no schedule can run: {why.message}"
        raise UserError(message, given=why.given, allowed=why.allowed, remedy=why.remedy)
    close = [c for c in found if c.total_s <= best * TIE]
    chosen = min(close, key=lambda c: SIMPLEST.index(c.name))
    others = sorted((c for c in found if c is not chosen), key=lambda c: (c.total_s, c.name))
    pairs = sum(layout.pairs(r, causal=causal, window=window, keys=keys) for r in range(layout.world))
    return Plan((chosen, *others), _ideal_s(pairs, shape, topology, backward))


def _candidate(
    name: str, make: Callable[..., Schedule], shape: AttentionShape, topology: Topology, travels: Sequence[str]
) -> Candidate:
    """Predict one schedule; ``usp`` with the best number of ranks that share tokens by heads."""
    # More members than query heads would leave ranks idle; all ranks together are ulysses.
    shares = [u for u in range(2, min(topology.world, shape.q_heads + 1)) if topology.world % u == 0]
    best = Candidate(name, None, None, (), rejection=_no_groups(topology.world, shape.q_heads))
    for ulysses in shares if name == "usp" else [None]:
        try:
            phases = zip(PHASES, travels, strict=False)
            made = [make(name, phase=phase, travels=wanted, ulysses=ulysses) for phase, wanted in phases]
        except UserError as error:
            best = Candidate(name, None, None, (), rejection=error)
            continue
        timed = [predict(each, shape, topology) for each in made]
        chosen = tuple(each.travels for each in made)
        candidate = Candidate(name, timed[0], timed[1] if len(timed) > 1 else None, chosen, ulysses)
        if candidate.total_s < best.total_s:
            best = candidate
    return best


def _no_groups(ranks: int, q_heads: int) -> UserError:
    return UserError(
        "no number of ranks divides them into head groups",
        given=f"{ranks} ranks, {q_heads} query heads",
        allowed="a divisor of the ranks between 1 and all, at most the query heads",
        remedy="Use another schedule.",
    )


def _ideal_s(pairs: int, shape: AttentionShape, topology: Topology, backward: bool) -> float:
    """Seconds of all unmasked pairs spread evenly over the ranks, at the kernel's speed, nothing else."""
    d, dv = shape.head_dim, shape.value_dim
    each = 2 * (d + dv) + (2 * (3 * d + 2 * dv) if backward else 0)
    return each * shape.q_heads * shape.batch * pairs / topology.machine.flops / topology.world
