"""Star Attention, phase 1: every later block sees the first block and itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.compress.base import Compressor
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.split import blocks
from apb.plan.steps import Step
from apb.strategies.anchored import Anchor, HostShare, anchored_plan
from apb.strategies.base import STRATEGIES, Strategy
from apb.strategies.budget import anchor_limits


def steps(host: HostShare) -> list[Step]:
    """Return one layer of one host: it runs [block 0 | own block] and sends nothing. Source: section 2.1."""
    return [
        *host.attend_anchor(),
        *host.attend_block(0),
        *host.attend_earlier(0),
    ]


@STRATEGIES.register("star", "approximate: every host sees the first block and its own; nothing is passed")
@dataclass(frozen=True)
class Star(Strategy):
    """Block h attends to [block 0 | block h]; nothing is passed. Source: arXiv 2411.17116, section 2."""

    complexity: ClassVar[int] = 6

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan: the anchor is the whole first block, without a question of its own. Raises UserError for
        a copy of the question beyond that block."""
        spans = blocks(lengths.context, hosts)
        if hosts > 1 and lengths.copied:
            anchor_limits(lengths, spans[0][1])  # rejects a copy of the question that anchors would cut
        return anchored_plan(
            steps,
            strategy=self.name,
            compressor=None,
            shape=shape,
            lengths=lengths,
            spans=spans,
            held=[(rank,) for rank in range(hosts)],
            anchor=Anchor(spans[0][1], skip=0, question=0),
            route="none",
            kept_rows=(0,) * hosts,
        )
