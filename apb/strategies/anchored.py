"""What star, apb and spava share: every block but the first sees an anchor, and passing blocks may join."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from apb.compress.base import Compressor
from apb.plan.plan import HostPlan, ModelShape, PrefillPlan, PromptLengths
from apb.plan.steps import Attend, GatherAnchor, Pass, Region, Route, Select, Step, TellRows, WaitAnchor, WaitPassing
from apb.strategies.budget import anchor_limits, sent_bytes
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
    """Return l_p, at most ``smallest``, what the host with the fewest tokens holds; raises UserError beyond it."""
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


def check_coverage(coverage: float | None, compressor: Compressor | None) -> None:
    """Raise UserError for a share of the scores that cannot be told."""
    if coverage is None:
        return
    if not 0 < coverage < 1:
        raise UserError(
            "no such share of the scores",
            given=f"strategy.passing_coverage={coverage}",
            allowed="more than 0 and less than 1",
            remedy="Choose 0.95, for example, or leave it out.",
        )
    if compressor is not None and compressor.measures is None:
        raise UserError(
            f"compressor '{compressor.name}' orders tokens, but does not say how much attention they get",
            given=f"strategy.passing_coverage={coverage}",
            allowed="compressors such as query, retaining, expected and snapkv",
            remedy="Choose another compressor, or leave strategy.passing_coverage out.",
        )


def anchored_plan(
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
    coverage: float | None = None,
    fused: bool = False,
) -> PrefillPlan:
    """Put the hosts' steps together. ``spans``: the blocks in position order; ``held``: their numbers by host.

    ``coverage``: blocks pass on fewer rows than ``kept_rows`` in layers where fewer cover that share of the scores.
    """
    hosts = len(held)
    anchor = dataclasses.replace(anchor, asks=anchor.asks and any(kept_rows))
    shared = anchor.form == "shared" and hosts > 1
    bare = [
        _host(rank, numbers, spans, anchor, (0, 0), shared, route, kept_rows, coverage)
        for rank, numbers in enumerate(held)
    ]
    plans = []
    work = [2 * shape.linear_params * h.tokens_run + _attention(shape, h.head_pairs(shape.q_heads)) for h in bare]
    per_token = 2 * shape.linear_params + _attention(shape, shape.q_heads * anchor.tokens // 2)
    shares = even_shares(work, anchor.tokens if shared else 0, per_token)
    for rank, (start, stop) in enumerate(itertools.pairwise(itertools.accumulate(shares, initial=0))):
        if not shared:
            # Block 0 has no anchor; its host runs the head of it beside the block when its compressor asks, though with
            # a copy of the question in the context these are the block's own first rows.
            beside = anchor.skip + anchor.question if anchor.asks and kept_rows[0] else 0
            start, stop = 0, anchor.tokens if rank else beside
        plans.append(_host(rank, held[rank], spans, anchor, (start, stop), shared, route, kept_rows, coverage))
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
        host_plans=tuple(plans),
        fused=fused,
    )


def adaptive(
    plan: Callable[[tuple[int, ...], float | None], PrefillPlan], rows: tuple[int, ...], coverage: float | None
) -> PrefillPlan:
    """Return the plan with ``rows`` a block, or with up to one less, as many as cover that share of the scores.

    The row less pays for telling how many are passed on, so that never more bytes are sent than with fixed rows. Where
    it does not, as with nothing to pass on, rows stay fixed.
    """
    fixed = plan(rows, None)
    if coverage is None:
        return fixed
    fewer = plan(tuple(max(0, r - 1) for r in rows), coverage)
    return fewer if any(fewer.kept_rows) and sent_bytes(fewer) <= sent_bytes(fixed) else fixed


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


def _attention(shape: ModelShape, head_pairs: int) -> int:
    return 4 * shape.head_dim * shape.layers * head_pairs


def _host(
    rank: int,
    numbers: tuple[int, ...],
    spans: list[tuple[int, int]],
    anchor: Anchor,
    run: tuple[int, int],
    shared: bool,
    route: Route,
    kept_rows: tuple[int, ...],
    coverage: float | None,
) -> HostPlan:
    """Return one host's part; ``run``: the anchor's tokens [start, stop) that it runs."""
    own = tuple(spans[number] for number in numbers)
    before, beside = run[0], run[1] - run[0]
    choose: list[Step] = []
    for place, number in enumerate(numbers):
        if kept_rows[number]:
            skip = min(anchor.tokens, own[place][1]) if number == 0 else 0
            choose.append(Select(kept_rows[number], skip, place, coverage))
        if route != "none" and coverage is None:
            choose.append(Pass(route, place))
    if route != "none" and coverage is not None:  # one message tells the rows of all blocks
        choose += [TellRows(), *(Pass(route, place) for place in range(len(numbers)))]
    # The anchor travels before the passing blocks and these while blocks are attended to, so waits stand late.
    within = [_attend("block", ("block",), stop - start, 0, place) for place, (start, stop) in enumerate(own)]
    share: list[Step] = []
    if beside:
        share = [_attend("anchor", ("share" if shared else "anchor",), beside)]
    steps: list[Step] = []
    if shared:
        late: list[Step] = [_attend("anchor", ("before",), beside, before)] if before and beside else []
        gathered = [WaitAnchor(), *late]
        steps.append(GatherAnchor(question=anchor.asks))
        if anchor.asks:  # selection needs the anchor: all blocks but the last hide it, the last one hides the passing
            steps += [*share, *within[:-1], *gathered, *choose, within[-1]]
        else:
            steps += [*choose, *share, *within, *gathered]
    else:
        steps += [*choose, *share, *within]
    for place, number in enumerate(numbers):
        if route != "none":
            steps.append(WaitPassing(place))
        rows: dict[Region, int] = {
            "anchor": (anchor.tokens if shared else beside) if number else 0,
            "passing": sum(kept_rows[:number]) if route != "none" else 0,
        }
        seen = tuple(region for region, length in rows.items() if length)
        if seen:
            start, stop = own[place]
            steps.append(_attend("block", seen, stop - start, sum(rows.values()), place))
    return HostPlan(rank, own, beside, tuple(steps), before)


def _attend(
    queries: Literal["anchor", "block"], keys: tuple[Region, ...], tokens: int, seen: int = 0, block: int = 0
) -> Attend:
    """Return a call of ``tokens`` queries on ``seen`` keys, or (0) on themselves, causally."""
    pairs = tokens * seen if seen else tokens * (tokens + 1) // 2
    return Attend(queries, keys, causal=not seen, pairs=pairs, block=block)
