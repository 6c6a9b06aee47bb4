"""APB: anchors that hold the question, and compressed blocks passed to every later host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from apb.compress.base import Compressor
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.split import blocks
from apb.plan.steps import Step
from apb.strategies import spava
from apb.strategies.anchored import AnchorForm, HostShare, anchored_plan, make_anchor, passing_length
from apb.strategies.base import STRATEGIES, Strategy
from apb.strategies.budget import at_cost
from burst.errors import choose
from burst.registry import option


def steps(host: HostShare) -> list[Step]:
    """Return one layer of one host, which runs [anchor | block]. Source: section 3, in the paper's order; the first
    attention to the block itself hides the passing."""
    return [
        *host.select(0),  # 3.3: block compression
        *host.pass_on(0),  # 3.4: communication starts
        *host.attend_anchor(),  # 3.5: computation, begun on what is here
        *host.attend_block(0),
        *host.wait_passing(0),
        *host.attend_earlier(0),  # and finished on anchor and passing blocks
    ]


@STRATEGIES.register(
    "apb",
    "approximate: anchors that hold the question, and compressed blocks passed to every later host",
)
@dataclass(frozen=True)
class APB(Strategy):
    """Accelerating distributed long-context inference by passing compressed context blocks.

    Source: arXiv 2502.12085, section 3; block split, uneven lengths, host 0's exclusion and the shared anchor are ours.
    """

    complexity: ClassVar[int] = 7
    takes_compressor: ClassVar[bool] = True

    anchor_len: int | None = option(
        None,
        "tokens of the first block that every later host runs too, question included; null: a quarter of a block",
    )
    passing_len: int | None = option(
        None, "keys and values that each host passes on per layer and kv head; null: an eighth of a block"
    )
    passing: Literal["ring", "allgather"] = option(
        "ring", "ring: every hop is forwarded while blocks are attended to; allgather: as published"
    )
    anchor: AnchorForm = option(
        "recomputed", "recomputed by every host, as published, or shared: computed once, spread over the hosts"
    )
    cost: float | None = option(
        None,
        "choose both lengths, two to one, for this share of full attention's prefill FLOPs on the busiest host, such "
        "as 0.1; no more bytes are sent than by the default lengths",
    )

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan; raises UserError for explicit lengths that do not fit, and for a cost below the least."""
        if self.cost is not None:
            return at_cost(self, lengths, hosts, shape, compressor)
        choose("passing route", self.passing, ("ring", "allgather"))
        choose("value of strategy.anchor:", self.anchor, get_args(AnchorForm))
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

        return anchored_plan(
            steps if self.anchor == "recomputed" else spava.steps,
            strategy=self.name,
            compressor=compressor.name if compressor is not None else None,
            shape=shape,
            lengths=lengths,
            spans=spans,
            held=[(rank,) for rank in range(hosts)],
            anchor=anchor,
            route=self.passing if passing and hosts > 1 else "none",
            kept_rows=tuple(kept),
        )
