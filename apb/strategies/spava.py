"""Spava's schedule: two blocks a host in zigzag, so that all hosts attend to equally many passing blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from apb.compress.base import Compressor
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.split import blocks
from apb.plan.steps import Step
from apb.strategies.anchored import HostShare, anchored_plan, make_anchor, passing_length
from apb.strategies.base import STRATEGIES, Strategy
from apb.strategies.budget import at_cost
from burst.errors import choose
from burst.registry import option

Lengths = Literal["apb", "published"]


def steps(host: HostShare) -> list[Step]:
    """Return one layer of one host: its share of the anchor, and one or two blocks. Source: section 3.

    The anchor travels before the passing rows, and both while blocks are attended to. A compressor that reads the
    question's queries waits for the anchor first: all blocks but the last then hide the anchor, the last one the rows.
    """
    passing = [step for place in host.places for step in (*host.select(place), *host.pass_on(place))]
    blocks = [step for place in host.places for step in host.attend_block(place)]
    if not host.shared:
        order = [passing, host.attend_anchor(), blocks]
    elif host.anchor.asks:
        hidden = [host.attend_anchor(), blocks[:-1], host.wait_anchor()]
        order = [host.gather_anchor(), *hidden, passing, blocks[-1:]]
    else:
        order = [host.gather_anchor(), passing, host.attend_anchor(), blocks, host.wait_anchor()]
    earlier = [step for place in host.places for step in (*host.wait_passing(place), *host.attend_earlier(place))]
    return [step for part in (*order, earlier) for step in part]


@STRATEGIES.register(
    "spava",
    "approximate: as apb, with two blocks a host, first and last paired, so that all hosts "
    "work alike, and one shared anchor",
)
@dataclass(frozen=True)
class Spava(Strategy):
    """Host r of H holds blocks r and 2H-1-r of 2H; a block attends to the anchor, the best rows of all earlier blocks,
    and itself. The anchor is computed once, spread over the hosts.

    Rows go straight to the hosts that hold a later
    block: those of one block while the other is attended to. The question runs in the blocks' own pass. With fewer
    than 2H tokens, the last hosts' second blocks go first.

    Source: arXiv 2601.21444; the shared anchor, direct sends and uneven lengths are ours.
    """

    complexity: ClassVar[int] = 8
    takes_compressor: ClassVar[bool] = True

    anchor_len: int | None = option(
        None, "tokens of the context's beginning that every later block sees, question included; null: by lengths"
    )
    passing_len: int | None = option(
        None,
        "keys and values that each host passes on per layer and kv head, half from each block; null: by lengths",
    )
    lengths: Lengths = option(
        "apb", "apb (a quarter and an eighth of a host's tokens) or published (both a 64th of the context)"
    )
    cost: float | None = option(
        None, "choose both lengths for this share of full attention's prefill FLOPs on the busiest host, such as 0.1"
    )

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan; raises UserError for explicit lengths that do not fit, and for a cost below the least."""
        if self.cost is not None:
            return at_cost(self, lengths, hosts, shape, compressor)
        choose("value of strategy.lengths:", self.lengths, get_args(Lengths))
        n = lengths.context
        blocks(n, hosts)  # rejects what no strategy can take
        count = min(2 * hosts, n) if hosts > 1 else 1
        spans = blocks(n, count)
        held = [tuple(b for b in (r, 2 * hosts - 1 - r) if b < count) for r in range(hosts)]
        first = spans[0][1]
        asks = compressor is not None and compressor.needs_question
        published = self.lengths == "published"
        default = n // 64 if published else n // hosts // 4
        anchor = make_anchor(lengths, hosts, first, self.anchor_len, default, "shared", asks=asks)
        passing = passing_length(self.passing_len, n // 64 if published else n // hosts // 8, n // hosts)
        half = -(-passing // 2)
        kept = [min(half, stop - start) for start, stop in spans]
        # Every other block has the first l_a positions in the anchor, as in apb.
        kept[0] = max(0, min(half, first - anchor.tokens))
        kept[-1] = 0  # nobody comes after it

        return anchored_plan(
            steps,
            strategy=self.name,
            compressor=compressor.name if compressor is not None else None,
            shape=shape,
            lengths=lengths,
            spans=spans,
            held=held,
            anchor=anchor,
            route="direct" if passing and hosts > 1 else "none",
            kept_rows=tuple(kept),
            fused=True,
        )
