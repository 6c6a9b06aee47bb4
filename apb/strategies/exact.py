"""Exact strategies: every position attends to all earlier ones, by one of burst's schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from apb.compress.base import Compressor
from apb.plan.exact import Spread
from apb.plan.plan import HostPlan, PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.split import blocks
from apb.plan.steps import AttendAll
from apb.strategies.base import Strategy
from burst.errors import choose
from burst.registry import option

LayoutName = Literal["contiguous", "zigzag"]  # what a host holds: one stretch, or one from each end


@dataclass(frozen=True)
class Exact(Strategy):
    """A strategy that is named after its schedule. ``layout`` says who holds which positions."""

    layout: LayoutName = option("zigzag", "zigzag (even work) or contiguous")

    def spread(self, context: int, hosts: int, shape: ModelShape) -> Spread:
        """Return which layout and schedule attend."""
        return Spread(self.name, self.layout, context, hosts)

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan; raises UserError for more hosts than tokens, or an unknown layout."""
        blocks(lengths.context, hosts)  # rejects what no strategy can take
        choose("layout", self.layout, get_args(LayoutName))
        spread = self.spread(lengths.context, hosts, shape)
        spread.members()  # rejects groups that do not divide the hosts
        return PrefillPlan(
            strategy=self.name,
            compressor=None,
            shape=shape,
            lengths=lengths,
            anchor_len=0,
            anchor_skip=0,
            question_len=0,
            route="none",
            kept_rows=(0,) * hosts,
            exact=True,
            host_plans=tuple(
                HostPlan(
                    rank,
                    spread.spans(rank),
                    anchor_len=0,
                    steps=(AttendAll(),),
                )
                for rank in range(hosts)
            ),
            spread=spread,
        )
