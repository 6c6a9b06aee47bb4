"""Time, bytes and memory of a whole prefill: of each kind a few layers on a clock, the others like the last of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from apb.costs import anchored, exact, replicated
from apb.costs.lockstep import Await, Clock, ClockStep, Exchange, HostWork, Seconds, shift
from apb.costs.network import Network
from apb.costs.rates import PASSES_HEADS, PASSES_HIDDEN, PASSES_MLP, Rates, read
from apb.layers.base import LayerKind
from apb.plan.bytes import partial_bytes, prefill_bytes
from apb.plan.memory import host_memory
from apb.plan.plan import PrefillPlan

SETTLED = 3  # layers until hosts that wait for earlier ones only are as far apart as they stay


@dataclass(frozen=True)
class Cost:
    """Seconds to the first token's logits: messages hidden as the steps are ordered, and not at all (``worst_s``).

    ``parts``: seconds of the host that works longest by what they go to; ``mixing``: those of them for attention,
    recurrences and selection, by the kind of layer; ``sent`` bytes by link class, all hosts; ``sent_most`` and
    ``memory`` are the most of any host.
    """

    seconds: float
    worst_s: float
    query_s: float  # of ``seconds``, the question's own pass
    parts: dict[str, float]
    mixing: dict[str, float]
    sent: dict[str, int]
    sent_most: int
    memory: int

    @property
    def exposed_s(self) -> float:
        """Seconds that the host that works longest does not work."""
        return max(0.0, self.seconds - sum(self.parts.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as a row."""
        return {
            "seconds": self.seconds,
            "worst_s": self.worst_s,
            "query_s": self.query_s,
            "exposed_s": self.exposed_s,
            "parts": self.parts,
            "mixing": self.mixing,
            "sent": self.sent,
            "sent_most": self.sent_most,
            "memory": self.memory,
        }


@dataclass(frozen=True)
class _Phase:
    """Layers of one kind: what one of them does, in how many layers it has settled, and how many there are."""

    kind: LayerKind
    program: list[ClockStep]
    settled: int
    layers: int


def cost(plan: PrefillPlan, rates: Rates, network: Network) -> Cost:
    """Cost a plan: every host's device has these ``rates``; context first, then the question over the sharded cache."""
    nodes = network.nodes(plan.hosts)
    context, question = _context(plan, rates, nodes), _question(plan, rates)
    clock, spent, work, sent = Clock(network.topology(plan.hosts)), [], defaultdict[str, Seconds](_zero), np.zeros(2)
    mixing = defaultdict[str, Seconds](_zero)
    for phases in (context, question):
        took = np.zeros(2)
        for phase in phases:
            seconds, parts, bytes_sent = _layers(clock, phase)
            took = took + seconds
            sent += bytes_sent
            for name, each in parts.items():
                work[name] = work[name] + each
                if name not in ("linear", "other"):
                    mixing[phase.kind.name] = mixing[phase.kind.name] + each
        spent.append(took)
    head, ranks = _head(plan, rates), range(plan.hosts)
    ordered, worst = np.sum(spent, axis=0) + head
    busiest = int(np.argmax(sum(work.values())))
    found = {name: float(each[busiest]) for name, each in work.items()}
    return Cost(
        seconds=float(ordered),
        worst_s=float(worst),
        query_s=float(spent[-1][0]) + head,
        parts={**found, "linear": found["linear"] + head},
        mixing={name: float(each[busiest]) for name, each in mixing.items()},
        sent={link: round(count) for link, count in zip(("intra", "inter"), sent, strict=True)},
        sent_most=max(sum(prefill_bytes(plan, r).values()) for r in ranks) + partial_bytes(plan, plan.lengths.query),
        memory=max(sum(host_memory(plan, r).values()) for r in ranks),
    )


def _zero() -> Seconds:
    return np.zeros(1)


def _layers(clock: Clock, phase: _Phase) -> tuple[Seconds, dict[str, Seconds], Seconds]:
    """Run the layers until they have settled and count the others like the last one.

    Returns seconds on both clocks, every host's work by part, and bytes by link class.
    """
    made, layers = min(phase.settled, phase.layers), phase.layers
    ends, sent, before = [clock.ends], clock.sent.copy(), dict[str, Seconds]()
    for _ in range(made):
        before = dict(clock.parts)
        clock.run(phase.program)
        ends.append(clock.ends)
    parts = {name: (seconds - before.get(name, 0.0)) * layers for name, seconds in clock.parts.items()}
    spent = ends[-1] - ends[0] + (layers - made) * (ends[-1] - ends[-2])
    return spent, parts, (clock.sent - sent) / made * layers


def _context(plan: PrefillPlan, rates: Rates, nodes: tuple[int, ...]) -> list[_Phase]:
    """The layers of the context, kind by kind."""
    gathers = plan.spread is not None or plan.shared_anchor is not None  # every layer brings all hosts together
    phases = []
    for kind, count in plan.shape.kinds.items():
        if not kind.sharded:
            own = replicated.mixing(plan, kind, rates)
        elif plan.spread is not None:
            own = exact.attention(plan, kind, rates, nodes)
        else:
            own = anchored.attention(plan, kind, rates)
        settled = 2 if gathers and kind.sharded else SETTLED
        phases.append(_Phase(kind, [_linear(plan, kind, rates), *own], settled, count))
    return phases


def _linear(plan: PrefillPlan, kind: LayerKind, rates: Rates) -> HostWork:
    """A layer's projections, and what else it does with every token."""
    tokens = [host.tokens_run for host in plan.host_plans]
    each = {count: _token_work(plan, kind, rates, count) for count in set(tokens)}
    return HostWork({name: np.array([each[count][name] for count in tokens]) for name in ("linear", "other")})


def _token_work(plan: PrefillPlan, kind: LayerKind, rates: Rates, tokens: int) -> dict[str, float]:
    """Seconds of a mixer's share of all layers; the model's layers are counted alike but for their mixing."""
    s = plan.shape
    layers = s.layers / len(s.mixers)  # a layer may have two mixers, or none
    moved = (PASSES_HIDDEN * s.hidden + PASSES_MLP * s.intermediate) * s.element_size * layers
    moved += PASSES_HEADS * kind.whole_row_bytes(s.element_size, exact=False)
    rest = moved / rates.memory if rates.rest_s is None else rates.rest_s * layers
    linear = 2 * s.linear_params * tokens / len(s.mixers) / read(rates.linear, tokens)
    return {"linear": linear, "other": rest * tokens}


def _question(plan: PrefillPlan, rates: Rates) -> list[_Phase]:
    """The layers of the question's own pass: on every host over its part of the cache, partial outputs merged."""
    if not plan.lengths.query:
        return []
    return [_Phase(kind, _question_layer(plan, kind, rates), 1, count) for kind, count in plan.shape.kinds.items()]


def _question_layer(plan: PrefillPlan, kind: LayerKind, rates: Rates) -> list[ClockStep]:
    m, n, e = plan.lengths.query, plan.lengths.context, plan.shape.element_size
    own = _token_work(plan, kind, rates, m)
    held = [host.block_len for host in plan.host_plans]
    flops = [kind.step_flops(m, n, rows, rank == plan.hosts - 1) for rank, rows in enumerate(held)]
    rows = np.array(held, dtype=float) * (kind.row_bytes(e) if kind.sharded else 0) + kind.held_bytes(n, e)
    # Few queries: the cache is read at the memory's pace, or multiplied at the kernel's.
    mixing = np.maximum(np.array(flops, dtype=float) / read(rates.full, m), rows / rates.memory) + rates.call_s
    work = HostWork({name: np.full(plan.hosts, seconds) for name, seconds in own.items()} | {kind.part: mixing})
    part = m * kind.partial_bytes(e)
    if plan.hosts == 1 or not part:
        return [work]
    merged = 3 * (plan.hosts - 1) * part / rates.memory
    each = np.full(plan.hosts, float(part))
    moves = tuple(shift(plan.hosts, k, lambda *_: each) for k in range(1, plan.hosts))
    return [work, Exchange("partials", moves), Await("partials"), HostWork({"other": np.full(plan.hosts, merged)})]


def _head(plan: PrefillPlan, rates: Rates) -> float:
    """The LM head for one token: its weights are read once."""
    return plan.shape.head_params * plan.shape.element_size / rates.memory if plan.lengths.query else 0.0
