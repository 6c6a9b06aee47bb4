"""Parts that star, apb and spava share: the anchor, the lengths, and one host's steps by name.

A strategy lists the steps of one host; ``anchored_plan`` makes them for every host and puts the plan together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from apb.plan.flops import attention_flops
from apb.plan.plan import HostPlan, PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.steps import Attend, GatherAnchor, Pass, Region, Route, Select, Step, WaitAnchor, WaitPassing
from apb.strategies.budget import anchor_limits
from burst.errors import UserError

AnchorForm = Literal["shared", "recomputed"]  # computed once, spread over the hosts; or by every host that sees it


@dataclass(frozen=True)
class Anchor:
    """The anchor that every block but the first sees: its length, and what stands in it."""

    tokens: int  # l_a
    skip: int  # context tokens before the question
    question: int  # tokens of the question, embedded or the context's own copy
    form: AnchorForm = "recomputed"
    asks: bool = False  # whether a compressor wants the queries of the question in it


def make_anchor(
    lengths: PromptLengths, hosts: int, first: int, asked: int | None, default: int, form: AnchorForm, *, asks: bool
) -> Anchor:
    """Return the anchor for hosts whose first block has ``first`` tokens: l_a as ``asked``, or ``default`` within its
    limits. ``asks``: whether a compressor wants the queries of the question.

    Raises UserError for an explicit length that does not fit.
    """
    skip = min(lengths.head, first)  # the anchor never reaches beyond block 0
    if hosts == 1:
        return Anchor(0, skip, 0, form, asks)
    least, most = anchor_limits(lengths, first)
    if asked is not None and not least <= asked <= most:
        raise UserError(
            f"the anchor must hold {skip} leading tokens and the question, {least - skip} tokens, and its context part "
            "must stay inside block 0",
            given=f"strategy.anchor_len={asked}",
            allowed=f"{least} to {most}",
            remedy="Choose a length in that range, or leave strategy.anchor_len out.",
        )
    tokens = min(max(default, least), most) if asked is None else asked
    return Anchor(tokens, skip, lengths.question, form, asks)


def passing_length(asked: int | None, default: int, smallest: int) -> int:
    """Return l_p, at most ``smallest``, the tokens of the smallest host; raises UserError beyond that."""
    if asked is None:
        return max(1, default)
    if not 0 <= asked <= smallest:
        raise UserError(
            "a passing block cannot be longer than the block it is taken from",
            given=f"strategy.passing_len={asked}",
            allowed=f"0 to {smallest}",
            remedy="Choose a smaller strategy.passing_len or fewer hosts.",
        )
    return asked


@dataclass(frozen=True)
class HostShare:
    """One host's part of an anchored prefill, and its steps by name.

    Each method returns the steps of its name, none where there is nothing to do: block 0 sees no anchor, the last
    block passes nothing on. ``place`` counts the host's own blocks.
    """

    rank: int
    numbers: tuple[int, ...]  # the host's blocks, numbered in position order
    spans: Sequence[tuple[int, int]]  # positions of all blocks
    anchor: Anchor
    run: tuple[int, int]  # anchor tokens [start, stop) that this host runs
    shared: bool  # whether the anchor's tokens are spread over the hosts
    route: Route
    kept_rows: tuple[int, ...]  # rows that each of all blocks passes on

    @property
    def places(self) -> range:
        """The host's own blocks."""
        return range(len(self.numbers))

    @property
    def beside(self) -> int:
        """Anchor tokens that this host runs."""
        return self.run[1] - self.run[0]

    def select(self, place: int) -> list[Step]:
        """Keep the block's best rows; none of block 0's that stand in every anchor."""
        number = self.numbers[place]
        skip = min(self.anchor.tokens, self._tokens(place)) if number == 0 else 0
        return [Select(self.kept_rows[number], skip, place)] if self.kept_rows[number] else []

    def pass_on(self, place: int) -> list[Step]:
        """Start passing the block's kept rows to later blocks, and receiving those of earlier ones."""
        return [Pass(self.route, place)] if self.route != "none" else []

    def wait_passing(self, place: int) -> list[Step]:
        """Wait for the rows of all blocks before this one."""
        return [WaitPassing(place)] if self.route != "none" else []

    def gather_anchor(self) -> list[Step]:
        """Start giving every host all shares of the anchor."""
        return [GatherAnchor(question=self.anchor.asks)]

    def wait_anchor(self) -> list[Step]:
        """Wait for all shares of the anchor; this host's share then attends to those before it."""
        before, beside = self.run[0], self.beside
        late: list[Step] = [_attend("anchor", ("before",), beside, before)] if before and beside else []
        return [WaitAnchor(), *late]

    def attend_anchor(self) -> list[Step]:
        """Attend the anchor tokens run here to one another, causally."""
        region: Region = "share" if self.shared else "anchor"
        return [_attend("anchor", (region,), self.beside)] if self.beside else []

    def attend_block(self, place: int) -> list[Step]:
        """Attend the block to itself, causally."""
        return [_attend("block", ("block",), self._tokens(place), block=place)]

    def attend_earlier(self, place: int) -> list[Step]:
        """Attend the block to the anchor and to the rows that all earlier blocks passed on."""
        number = self.numbers[place]
        rows: dict[Region, int] = {
            "anchor": (self.anchor.tokens if self.shared else self.beside) if number else 0,
            "passing": sum(self.kept_rows[:number]) if self.route != "none" else 0,
        }
        seen = tuple(region for region, length in rows.items() if length)
        return [_attend("block", seen, self._tokens(place), sum(rows.values()), place)] if seen else []

    def _tokens(self, place: int) -> int:
        start, stop = self.spans[self.numbers[place]]
        return stop - start


Steps = Callable[[HostShare], list[Step]]


def anchored_plan(
    steps: Steps,
    *,
    strategy: str,
    compressor: str | None,
    shape: ModelShape,
    lengths: PromptLengths,
    spans: list[tuple[int, int]],
    held: list[tuple[int, ...]],
    anchor: Anchor,
    route: Route,
    kept_rows: tuple[int, ...],
    fused: bool = False,
) -> PrefillPlan:
    """Put the hosts' ``steps`` together. ``spans``: the blocks in position order; ``held``: their numbers by host."""
    hosts = len(held)
    anchor = dataclasses.replace(anchor, asks=anchor.asks and any(kept_rows))
    shared = anchor.form == "shared" and hosts > 1

    def host(rank: int, run: tuple[int, int]) -> HostPlan:
        share = HostShare(rank, held[rank], spans, anchor, run, shared, route, kept_rows)
        own = tuple(spans[number] for number in share.numbers)
        return HostPlan(rank, own, share.beside, tuple(steps(share)), run[0])

    if shared:
        bare = [host(rank, (0, 0)) for rank in range(hosts)]
        linear = 2 * shape.linear_params
        work = [linear * h.tokens_run + attention_flops(shape, h.pairs) for h in bare]
        per_token = linear + attention_flops(shape, anchor.tokens // 2)
        runs = list(itertools.pairwise(itertools.accumulate(even_shares(work, anchor.tokens, per_token), initial=0)))
    else:
        # Block 0 has no anchor; its host runs the head of it beside the block when its compressor asks, though with
        # a copy of the question in the context these are the block's own first rows.
        first = anchor.skip + anchor.question if anchor.asks and kept_rows[0] else 0
        runs = [(0, anchor.tokens if rank else first) for rank in range(hosts)]
    return PrefillPlan(
        strategy=strategy,
        compressor=compressor,
        shape=shape,
        lengths=lengths,
        anchor_len=anchor.tokens if hosts > 1 else 0,
        anchor_skip=anchor.skip,
        question_len=anchor.question,
        route=route,
        kept_rows=kept_rows,
        exact=hosts == 1,
        host_plans=tuple(host(rank, run) for rank, run in enumerate(runs)),
        fused=fused,
    )


def even_shares(work: list[int], tokens: int, per_token: int) -> list[int]:
    """Deal ``tokens`` of equal cost to hosts that have ``work`` already, so that the busiest has little to do."""
    low, high = min(work), max(work) + tokens * per_token
    while low < high:  # the lowest level at which all tokens find room below it
        level = (low + high) // 2
        low, high = (low, level) if sum(_room(level, w, per_token) for w in work) >= tokens else (level + 1, high)
    shares, left = [], tokens
    for w in work:
        shares.append(min(left, _room(low, w, per_token)))
        left -= shares[-1]
    return shares


def _room(level: int, work: int, per_token: int) -> int:
    return max(0, level - work) // per_token


def _attend(
    queries: Literal["anchor", "block"], keys: tuple[Region, ...], tokens: int, seen: int = 0, block: int = 0
) -> Attend:
    """Return a call of ``tokens`` queries on ``seen`` keys, or (0) on themselves, causally."""
    pairs = tokens * seen if seen else tokens * (tokens + 1) // 2
    return Attend(queries, keys, causal=not seen, pairs=pairs, block=block)
