"""Runs strategies on emulated hosts, in rounds side by side, and puts what was recorded on a timeline."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apb.costs.network import Network
from apb.engine.engine import Engine
from apb.engine.setup import Setup
from apb.models.adapter import Adapter
from apb.plan.flops import part_flops
from apb.plan.plan import PrefillPlan
from apb.prompt.prompt import Prompt
from bench.emulate.cluster import EmulatedCluster
from bench.tools.timing import spread
from burst.planner.events import Interval, TimelineEvent
from burst.planner.timeline import interval, parts

PARTS = ("linear", "attention", "recurrence", "selection", "other")


@dataclass
class Measured:
    """Results of one strategy's rounds; the lists are by round."""

    setup: Setup
    plan: PrefillPlan
    programs: list[list[list[TimelineEvent]]] = field(default_factory=list)
    times: list[Interval] = field(default_factory=list)
    sent: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The strategy."""
        return self.setup.strategy.name

    @property
    def worst_s(self) -> list[float]:
        """The pessimistic makespans."""
        return [each.worst_s for each in self.times]

    @property
    def middle(self) -> int:
        """The round whose pessimistic makespan is the median one."""
        order = sorted(range(len(self.times)), key=lambda i: self.worst_s[i])
        return order[(len(order) - 1) // 2]

    def part_s(self, number: int) -> list[dict[str, float]]:
        """Return the seconds of each host in a round by what they went to."""
        return [dict.fromkeys(PARTS, 0.0) | parts(program) for program in self.programs[number]]

    def part_flops(self) -> dict[str, int]:
        """Return the FLOPs of all hosts, context and question, by what they go to."""
        found = Counter[str]()
        for rank in range(self.plan.hosts):
            found.update(part_flops(self.plan, rank))
        return dict(found)

    def row(self) -> dict[str, Any]:
        """Return the strategy's line of the table; the headline ``seconds`` is the pessimistic end."""
        at = self.middle
        timeline, works = self.times[at].ordered, self.part_s(at)
        slowest = max(range(self.plan.hosts), key=lambda r: timeline.work_s[r])
        done = self.part_flops()
        seconds = {name: sum(host[name] for host in works) for name in done}
        return {
            "strategy": self.name,
            "compressor": self.plan.compressor,
            "hosts": self.plan.hosts,
            "emulated": True,
            "seconds": spread(self.worst_s),
            "ordered_s": spread([each.ordered.total_s for each in self.times]),
            "best_s": spread([each.best_s for each in self.times]),
            "exposed_s": spread([each.exposed_s for each in self.times]),
            "work_s": list(timeline.work_s),
            "idle_s": list(timeline.idle_s),
            "slowest_host": {"rank": slowest, **works[slowest]},
            "rates": {name: done[name] / seconds[name] for name in done},
            "flops": [sum(part_flops(self.plan, r).values()) for r in range(self.plan.hosts)],
            **self.sent,
        }


def run(
    setups: Sequence[Setup],
    prompt: Prompt,
    short: Prompt,
    adapter: Adapter,
    network: Network,
    repeats: int,
    beside: Callable[[int], None],
    tell: Callable[[str], None],
) -> list[Measured]:
    """Measure every setup once a round; a first round with the ``short`` prompt is not counted.

    ``beside(number)`` is called once a round, for what is to be measured under the same conditions.
    """
    found = []
    for setup in setups:
        plan = setup.plan(prompt)
        found.append(Measured(setup, plan))
    for number in range(-1, repeats):
        beside(number)
        for each in found:
            tell(f"Round {number + 1} of {repeats}: {each.name}" if number >= 0 else f"Warm-up: {each.name}")
            programs, sent = record(each.setup, prompt if number >= 0 else short, adapter, network)
            if number >= 0:
                each.programs.append(programs)
                each.times.append(interval(programs, network.topology(each.plan.hosts)))
                each.sent = sent
    return found


def record(
    setup: Setup, prompt: Prompt, adapter: Adapter, network: Network
) -> tuple[list[list[TimelineEvent]], dict[str, dict[str, int]]]:
    """Prefill once on emulated hosts; return their programs, and the bytes that all sent by kind and by link."""
    cluster = EmulatedCluster(setup.spec, setup.hosts, adapter, network.nodes(setup.hosts))
    with Engine(dataclasses.replace(setup, tokenizer=None), cluster) as engine:
        handle = engine.prefill(prompt)
        programs = cluster.programs
        metrics = handle.metrics
    kinds = ("bytes_by_kind", "bytes_by_link")
    return programs, {kind: dict(Counter(metrics[kind])) for kind in kinds}
