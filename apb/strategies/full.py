"""Full attention on one host: the exact baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.compress.base import Compressor
from apb.plan.plan import HostPlan, PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.split import blocks
from apb.plan.steps import Attend
from apb.strategies.base import STRATEGIES, Strategy
from burst.errors import UserError


@STRATEGIES.register("full", "exact: one host, full causal attention")
@dataclass(frozen=True)
class Full(Strategy):
    """One host prefills everything with causal attention."""

    complexity: ClassVar[int] = 0
    default_hosts: ClassVar[int | None] = 1

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the one-host plan; raises UserError for any other number of hosts."""
        if hosts != 1:
            raise UserError(
                "strategy 'full' runs on one host",
                given=f"{hosts} hosts",
                allowed="1",
                remedy="Leave cluster.hosts out, or choose strategy=ring, apb or star.",
            )
        (span,) = blocks(lengths.context, hosts)
        n = span[1]
        step = Attend("block", ("block",), causal=True, pairs=n * (n + 1) // 2)
        host = HostPlan(0, (span,), anchor_len=0, steps=(step,))
        return PrefillPlan(
            strategy=self.name,
            compressor=None,
            shape=shape,
            lengths=lengths,
            anchor_len=0,
            anchor_skip=0,
            question_len=0,
            route="none",
            kept_rows=(0,),
            exact=True,
            host_plans=(host,),
        )
