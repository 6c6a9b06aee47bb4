"""One layer of star, apb and spava as steps of all hosts at once: what the plan's steps say, with seconds."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from apb.costs.lockstep import Await, ClockStep, Exchange, Hosts, HostWork, Move, Relay, Seconds, shift
from apb.costs.rates import Rates, read
from apb.layers.base import LayerKind
from apb.plan.plan import PrefillPlan
from apb.plan.steps import Attend, AttendAll, GatherAnchor, Pass, Select, WaitAnchor, WaitPassing

Together = GatherAnchor | WaitAnchor | Pass | WaitPassing
Meeting = tuple[str, int]  # what hosts do together, and for which of their blocks


def attention(plan: PrefillPlan, kind: LayerKind, rates: Rates) -> list[ClockStep]:
    """Return what a layer of this kind does after its projections."""
    kv_heads = kind.attention_shape(plan.shape.element_size).kv_heads
    order = _meetings(plan)
    turn = {meeting: at + 1 for at, meeting in enumerate(order)}
    work = [defaultdict[str, Seconds](lambda: np.zeros(plan.hosts)) for _ in range(len(order) + 1)]
    for host in plan.host_plans:
        at, seen = 0, set[tuple[str, int]]()
        for step in host.steps:
            match step:
                case Attend():
                    begun = (step.queries, step.block) in seen
                    seen.add((step.queries, step.block))
                    for name, seconds in _attend(step, plan, kind, host.rank, rates, begun).items():
                        work[at][name][host.rank] += seconds
                case Select():
                    start, stop = host.spans[step.block]
                    work[at]["selection"][host.rank] += (stop - start) * kv_heads / rates.select
                case AttendAll():
                    raise AssertionError("an exact plan")
                case _:
                    at = turn[_meeting(step)]
    steps: list[ClockStep] = [HostWork(dict(work[0]))]
    for at, meeting in enumerate(order):
        steps += [*_together(meeting, plan, kind), HostWork(dict(work[at + 1]))]
    return steps


def _meeting(step: Together) -> Meeting:
    return type(step).__name__, getattr(step, "block", 0)


def _meetings(plan: PrefillPlan) -> list[Meeting]:
    """Return the steps that hosts take together, in the order of the host that takes most of them."""
    own = ([_meeting(s) for s in host.steps if isinstance(s, Together)] for host in plan.host_plans)
    return max(own, key=len)


def _together(meeting: Meeting, plan: PrefillPlan, kind: LayerKind) -> list[ClockStep]:
    what, block = meeting
    if what.startswith("Wait"):
        return [Await(f"{what.removeprefix('Wait')} {block}")]
    return [_passed(what, block, plan, kind)]


def _passed(what: str, block: int, plan: PrefillPlan, kind: LayerKind) -> ClockStep:
    e = plan.shape.element_size
    row = kind.row_bytes(e)
    if what == "GatherAnchor":
        asked = [stop - start for start, stop in (plan.question_rows(r) for r in range(plan.hosts))]
        queries = kind.query_bytes(e) if plan.shared_anchor is not None and plan.shared_anchor.question else 0
        held = [host.anchor_len * row for host in plan.host_plans]
        share = np.array(held, dtype=float) + np.array(asked, dtype=float) * queries
        return Exchange(f"Anchor {block}", _all(plan.hosts, share))
    kept = np.array([plan.kept_rows[held[block]] if len(held) > block else 0 for held in plan.numbers])
    name = f"Passing {block}"
    if plan.route == "ring":
        return Relay(name, (kept * row).astype(float))
    if plan.route == "allgather":
        return Exchange(name, _all(plan.hosts, (kept * row).astype(float)))
    number = np.array([held[block] if len(held) > block else len(plan.blocks) for held in plan.numbers])
    last = np.array([held[-1] for held in plan.numbers])

    def size(source: Hosts, target: Hosts) -> Seconds:
        sent: Seconds = kept[source] * row * (last[target] > number[source]).astype(float)
        return sent

    return Exchange(name, tuple(shift(plan.hosts, k, size) for k in range(1, plan.hosts)))


def _all(hosts: int, sizes: Seconds) -> tuple[Move, ...]:
    """Everything to everyone, by distance: libraries rotate so."""
    return tuple(shift(hosts, k, lambda source, _: sizes[source]) for k in range(1, hosts))


def _attend(step: Attend, plan: PrefillPlan, kind: LayerKind, rank: int, rates: Rates, begun: bool) -> dict[str, float]:
    """Return the seconds of one kernel call, and of merging it with what these queries have ``begun``."""
    host, wide = plan.host_plans[rank], kind.attention_shape(plan.shape.element_size).value_dim
    start, stop = host.spans[step.block]
    tokens = host.anchor_len if step.queries == "anchor" else stop - start
    keys = tokens if step.causal else step.pairs / tokens
    rate = read(rates.causal if step.causal else rates.full, keys)
    merged = 3 * 4 * tokens * kind.heads * wide / rates.memory if begun else 0.0
    made = plan.passing_rows(rank) if "passing" in step.keys else 0  # the others are among a host's linear layers
    expanded = kind.heads * kind.expansion_flops * made / read(rates.linear, max(1, made))
    return {"attention": kind.heads * kind.pair_flops * step.pairs / rate + expanded + rates.call_s, "other": merged}
