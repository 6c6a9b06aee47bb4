"""APB: anchors that hold the question, and compressed blocks passed to every later host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from apb.compress.base import Compressor
from apb.plan.plan import ModelShape, PrefillPlan, PromptLengths
from apb.plan.split import blocks
from apb.strategies.anchored import (
    AnchorForm,
    adaptive,
    anchored_plan,
    check_coverage,
    make_anchor,
    passing_length,
)
from apb.strategies.base import Strategy
from apb.strategies.budget import at_cost
from burst.errors import choose


@dataclass(frozen=True)
class APB(Strategy):
    """Accelerating distributed long-context inference by passing compressed context blocks.

    Parameters: ``anchor_len`` l_a in tokens, the question included (default: a quarter of a block, at least head and
    question); ``passing_len`` l_p, rows each host passes on (default: an eighth of a block); ``passing``: ``ring``
    forwards every hop while the block's causal attention runs, ``allgather`` is the published form; ``anchor``:
    ``recomputed`` by every host, as published, or ``shared``: computed once, spread over the hosts, gathered per layer;
    ``cost``: choose both lengths, two to one, so that the busiest host computes this share of full attention's prefill;
    ``passing_coverage``: pass on fewer rows in layers where they cover this share of the scores. Neither ever sends
    more bytes than the lengths without it.

    Source: arXiv 2502.12085, section 3; block split, uneven lengths, host 0's exclusion and the shared anchor are ours.
    """

    name: ClassVar[str] = "apb"
    takes_compressor: ClassVar[bool] = True

    anchor_len: int | None = None
    passing_len: int | None = None
    passing: Literal["ring", "allgather"] = "ring"
    anchor: AnchorForm = "recomputed"
    cost: float | None = None
    passing_coverage: float | None = None

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan; raises UserError for explicit lengths that do not fit, and for a cost below the least."""
        if self.cost is not None:
            return at_cost(self, lengths, hosts, shape, compressor)
        choose("passing route", self.passing, ("ring", "allgather"))
        choose("value of strategy.anchor:", self.anchor, get_args(AnchorForm))
        check_coverage(self.passing_coverage, compressor)
        spans = blocks(lengths.context, hosts)
        smallest, first = lengths.context // hosts, spans[0][1]
        asks = compressor is not None and compressor.needs_question
        anchor = make_anchor(lengths, hosts, first, self.anchor_len, smallest // 4, self.anchor, asks=asks)
        passing = passing_length(self.passing_len, smallest // 8, smallest)
        last_sends = self.passing == "allgather"
        kept = [min(passing, stop - start) for start, stop in spans]
        # Host 0 offers none of the first l_a positions of the context, as published, though anchors that embed the
        # question hold only the first l_a - l_q: l_q positions of block 0 are then neither in an anchor nor passed on.
        kept[0] = max(0, min(passing, first - anchor.tokens))
        if hosts == 1 or not last_sends:
            kept[-1] = 0

        def plan(rows: tuple[int, ...], coverage: float | None) -> PrefillPlan:
            return anchored_plan(
                strategy=self.name,
                compressor=compressor.name if compressor is not None else None,
                shape=shape,
                lengths=lengths,
                spans=spans,
                held=[(rank,) for rank in range(hosts)],
                anchor=anchor,
                route=self.passing if passing and hosts > 1 else "none",
                kept_rows=rows,
                coverage=coverage,
            )

        return adaptive(plan, tuple(kept), self.passing_coverage)
