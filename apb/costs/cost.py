"""Time, bytes and memory of a whole prefill: a few layers on a clock, the others like the last of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apb.costs import anchored, exact
from apb.costs.lockstep import Await, Clock, ClockStep, Exchange, HostWork, Seconds, shift
from apb.costs.network import Network
from apb.costs.rates import PASSES_HEADS, PASSES_HIDDEN, PASSES_MLP, Rates, read
from apb.plan.bytes import partial_bytes, prefill_bytes
from apb.plan.memory import host_memory
from apb.plan.plan import PrefillPlan

SETTLED = 3  # layers until hosts that wait for earlier ones only are as far apart as they stay


@dataclass(frozen=True)
class Cost:
    """Seconds to the first token's logits: messages hidden as the steps are ordered, and not at all (``worst_s``).

    ``parts``: seconds of the host that works longest by what they go to; ``sent`` bytes by link class, all hosts;
    ``sent_most`` and ``memory`` are the most of any host.
    """

    seconds: float
    worst_s: float
    query_s: float  # of ``seconds``, the question's own pass
    parts: dict[str, float]
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
            "sent": self.sent,
            "sent_most": self.sent_most,
            "memory": self.memory,
        }


def cost(plan: PrefillPlan, rates: Rates, network: Network) -> Cost:
    """Cost a plan: every host's device has these ``rates``; context first, then the question over the sharded cache."""
    nodes = network.nodes(plan.hosts)
    own = exact.attention(plan, rates, nodes) if plan.spread is not None else anchored.attention(plan, rates)
    gathers = plan.spread is not None or plan.shared_anchor is not None  # every layer brings all hosts together
    phases: list[tuple[list[ClockStep], int]] = [([_linear(plan, rates), *own], 2 if gathers else SETTLED)]
    if plan.lengths.query:
        phases.append((_question(plan, rates), 1))
    clock, spent, work, sent = Clock(network.topology(plan.hosts)), [], Counter[str](), np.zeros(2)
    for program, settled in phases:
        seconds, busiest, bytes_sent = _layers(clock, program, settled, plan.shape.layers)
        spent.append(seconds)
        work.update(busiest)
        sent += bytes_sent
    head, ranks = _head(plan, rates), range(plan.hosts)
    ordered, worst = np.sum(spent, axis=0) + head
    return Cost(
        seconds=float(ordered),
        worst_s=float(worst),
        query_s=float(spent[-1][0]) + head if plan.lengths.query else 0.0,
        parts={**work, "linear": work["linear"] + head},
        sent={link: round(count) for link, count in zip(("intra", "inter"), sent, strict=True)},
        sent_most=max(sum(prefill_bytes(plan, r).values()) for r in ranks) + partial_bytes(plan, plan.lengths.query),
        memory=max(sum(host_memory(plan, r).values()) for r in ranks),
    )


def _layers(
    clock: Clock, program: Sequence[ClockStep], settled: int, layers: int
) -> tuple[Seconds, dict[str, float], Seconds]:
    """Run ``settled`` layers and count the others like the last one.

    Returns seconds on both clocks, those of the host that works longest by part, and bytes by link class.
    """
    made = min(settled, layers)
    ends, sent = [clock.ends], clock.sent.copy()
    for _ in range(made):
        before = dict(clock.parts)
        clock.run(program)
        ends.append(clock.ends)
    layer = {name: seconds - before.get(name, 0.0) for name, seconds in clock.parts.items()}
    busiest = int(np.argmax(sum(layer.values())))
    parts = {name: float(seconds[busiest]) * layers for name, seconds in layer.items()}
    spent = ends[-1] - ends[0] + (layers - made) * (ends[-1] - ends[-2])
    return spent, parts, (clock.sent - sent) / made * layers


def _linear(plan: PrefillPlan, rates: Rates) -> HostWork:
    """A layer's projections, and what else it does with every token."""
    tokens = [host.tokens_run for host in plan.host_plans]
    each = {count: _token_work(plan, rates, count) for count in set(tokens)}
    return HostWork({name: np.array([each[count][name] for count in tokens]) for name in ("linear", "other")})


def _token_work(plan: PrefillPlan, rates: Rates, tokens: int) -> dict[str, float]:
    s = plan.shape
    widths = PASSES_HIDDEN * s.hidden + PASSES_MLP * s.intermediate
    widths += PASSES_HEADS * (s.heads.q_heads + 2 * s.heads.kv_heads) * s.heads.qk_dim
    rest = widths * s.element_size / rates.memory if rates.rest_s is None else rates.rest_s
    linear = 2 * s.linear_params * tokens / s.layers / read(rates.linear, tokens)
    return {"linear": linear, "other": rest * tokens}


def _question(plan: PrefillPlan, rates: Rates) -> list[ClockStep]:
    """One layer of the question's own pass: on every host over its part of the cache, partial outputs merged."""
    s, m = plan.shape, plan.lengths.query
    own = _token_work(plan, rates, m)
    held = np.array([host.block_len for host in plan.host_plans], dtype=float)
    # Few queries: the cache is read at the memory's pace, or multiplied at the kernel's.
    pairs = s.heads.pair_flops * s.heads.q_heads * m * held / read(rates.full, m)
    attention = np.maximum(pairs, held * s.widest_row / rates.memory) + rates.call_s
    work = HostWork({name: np.full(plan.hosts, seconds) for name, seconds in own.items()} | {"attention": attention})
    if plan.hosts == 1:
        return [work]
    part = m * s.partial_bytes // s.layers
    merged = 3 * (plan.hosts - 1) * part / rates.memory

    each = np.full(plan.hosts, float(part))
    moves = tuple(shift(plan.hosts, k, lambda *_: each) for k in range(1, plan.hosts))
    return [work, Exchange("partials", moves), Await("partials"), HostWork({"other": np.full(plan.hosts, merged)})]


def _head(plan: PrefillPlan, rates: Rates) -> float:
    """The LM head for one token: its weights are read once."""
    return plan.shape.head_params * plan.shape.element_size / rates.memory if plan.lengths.query else 0.0
