"""Star Attention, phase 1: every later block sees the first block and itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.compress.base import Compressor
from apb.plan import ModelShape, PrefillPlan, PromptLengths, blocks
from apb.strategies.anchored import anchored_plan
from apb.strategies.base import Strategy


@dataclass(frozen=True)
class Star(Strategy):
    """Block h attends to [block 0 | block h]; nothing is passed. Source: arXiv 2411.17116, section 2."""

    name: ClassVar[str] = "star"

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan: the anchor is the whole first block, without the question."""
        spans = blocks(lengths.context, hosts)
        return anchored_plan(
            strategy=self.name,
            compressor=None,
            shape=shape,
            lengths=lengths,
            spans=spans,
            anchor_len=spans[0][1],
            anchor_skip=0,
            question_len=0,
            route="none",
            kept_rows=(0,) * hosts,
            first_host_head=0,
        )
