"""Add a strategy of one's own: every block sees the context's first tokens and itself, and nothing is passed.

    python docs/examples/own_strategy.py [MODEL]

A strategy is a plan. It lists the steps of one host; the interpreter in ``apb/attention`` runs them, and bytes, FLOPs
and memory are worked out from them. As a package of your own it needs an entry point as well:

    [project.entry-points."apb.strategies"]
    sinks = "my_package.sinks"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from apb import Engine
from apb.compress.base import Compressor
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.split import blocks
from apb.plan.steps import Step
from apb.strategies import strategy
from apb.strategies.anchored import Anchor, HostShare, anchored_plan
from apb.strategies.base import STRATEGIES, Strategy
from burst.errors import in_range
from burst.registry import option

TEXT = "The ferry leaves at nine. The baker opens at six. The museum is closed on Mondays. " * 20


def steps(host: HostShare) -> list[Step]:
    """Return one layer of one host, which runs [first tokens | own block]."""
    return [
        *host.attend_anchor(),
        *host.attend_block(0),
        *host.attend_earlier(0),
    ]


@STRATEGIES.register("sinks", "approximate: every host sees the first tokens and its own block; nothing is passed")
@dataclass(frozen=True)
class Sinks(Strategy):
    """Star Attention with a short anchor. Its cache is approximate."""

    sinks: int = option(64, "tokens at the context's start that every block sees")

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan; raises UserError for a number of sinks out of range."""
        spans = blocks(lengths.context, hosts)
        first = spans[0][1]
        in_range("strategy.sinks", self.sinks, 1 <= self.sinks <= first, f"1 to {first}, the first block's length")
        return anchored_plan(
            steps,
            strategy=self.name,
            compressor=None,
            shape=shape,
            lengths=lengths,
            spans=spans,
            held=[(rank,) for rank in range(hosts)],
            anchor=Anchor(self.sinks, skip=0, question=0),
            route="none",
            kept_rows=(0,) * hosts,
        )


def main(model: str = "smollm2-135m") -> str:
    """Print an answer from a cache that was prefilled so; return it."""
    with Engine.launch(model, cluster="virtual", hosts=3, strategy=strategy("sinks", sinks=32)) as engine:
        handle = engine.prefill(context=TEXT, query="When does the ferry leave?")
        answer = engine.generate(handle, max_new_tokens=16)
        plan = handle.metrics["plan"]
        anchors = [host["anchor_tokens"] for host in plan["per_host"]]
        sys.stdout.write(f"{answer.text}\n{plan['strategy']}: anchors of {anchors} tokens\n")
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
