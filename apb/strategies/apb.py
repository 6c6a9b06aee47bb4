"""APB: anchors that hold the question, and compressed blocks passed to every later host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from apb.compress.base import Compressor
from apb.plan import ModelShape, PrefillPlan, PromptLengths, blocks
from apb.strategies.anchored import anchored_plan
from apb.strategies.base import Strategy
from burst.errors import UserError, choose


@dataclass(frozen=True)
class APB(Strategy):
    """Accelerating distributed long-context inference by passing compressed context blocks.

    Parameters: ``anchor_len`` l_a in tokens, the question included (default: a quarter of a block, at least head and
    question); ``passing_len`` l_p, rows each host passes on (default: an eighth of a block); ``passing``: ``ring``
    forwards every hop while the block's causal attention runs, ``allgather`` is the published form.

    Source: arXiv 2502.12085, section 3; block split, uneven lengths and host 0's exclusion are ours.
    """

    name: ClassVar[str] = "apb"
    takes_compressor: ClassVar[bool] = True

    anchor_len: int | None = None
    passing_len: int | None = None
    passing: Literal["ring", "allgather"] = "ring"

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan; raises UserError for explicit lengths that do not fit."""
        choose("passing route", self.passing, ("ring", "allgather"))
        spans = blocks(lengths.context, hosts)
        smallest, first = lengths.context // hosts, spans[0][1]
        question = lengths.question if hosts > 1 else 0
        skip = min(lengths.head, first)  # the anchor never reaches beyond block 0
        anchor = self._anchor(smallest, first, skip, question, hosts)
        passing = self._passing(smallest)
        last_sends = self.passing == "allgather"
        kept = [min(passing, stop - start) for start, stop in spans]
        # Host 0 offers none of the first l_a positions of the context, as published, though the anchors hold only the
        # first l_a - l_q of them beside the question: l_q positions of block 0 are neither in an anchor nor passed on.
        kept[0] = max(0, min(passing, first - anchor))
        if hosts == 1 or not last_sends:
            kept[-1] = 0
        needs_question = compressor is not None and compressor.needs_question
        return anchored_plan(
            strategy=self.name,
            compressor=compressor.name if compressor is not None else None,
            shape=shape,
            lengths=lengths,
            spans=spans,
            anchor_len=anchor,
            anchor_skip=skip,
            question_len=question,
            route=self.passing if passing and hosts > 1 else "none",
            kept_rows=tuple(kept),
            first_host_head=skip + question if needs_question and kept[0] else 0,
        )

    def _anchor(self, smallest: int, first: int, skip: int, question: int, hosts: int) -> int:
        least, most = skip + question, first + question
        if self.anchor_len is None or hosts == 1:
            return min(max(smallest // 4, least), most)
        if not least <= self.anchor_len <= most:
            raise UserError(
                f"the anchor must hold {skip} leading tokens and {question} question tokens, and its context part "
                "must stay inside block 0",
                given=f"strategy.anchor_len={self.anchor_len}",
                allowed=f"{least} to {most}",
                remedy="Choose a length in that range, or leave strategy.anchor_len out.",
            )
        return self.anchor_len

    def _passing(self, smallest: int) -> int:
        if self.passing_len is None:
            return max(1, smallest // 8)
        if not 0 <= self.passing_len <= smallest:
            raise UserError(
                "a passing block cannot be longer than the block it is taken from",
                given=f"strategy.passing_len={self.passing_len}",
                allowed=f"0 to {smallest}",
                remedy="Choose a smaller strategy.passing_len or fewer hosts.",
            )
        return self.passing_len
