"""Anchor and passing lengths for a given cost, found on plans alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from apb.compress.base import Compressor
from apb.plan.bytes import sent_bytes
from apb.plan.flops import critical_flops
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.strategies.base import Strategy
from apb.strategies.full import Full
from burst.errors import UserError

MakePlan = Callable[[int | None, int | None], PrefillPlan]  # of an anchor's and a passing block's length


def anchor_limits(lengths: PromptLengths, first: int) -> tuple[int, int]:
    """Return the least and the greatest l_a; ``first``: tokens of block 0, which holds the anchor's context tokens.

    Raises UserError where the context's own copy of the question is not within block 0.
    """
    if not lengths.copied:
        return min(lengths.head, first) + lengths.question, first + lengths.question
    least = lengths.head + lengths.copied
    if least > first:
        raise UserError(
            "the question before the document is not within the first block, so anchors cannot show it",
            given=f"{least} tokens up to the question's end, of which the first block holds {first}",
            allowed="questions within the first block",
            remedy="Use fewer hosts, or question_first=false.",
        )
    return least, first


def at_cost(
    strategy: Strategy, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None
) -> PrefillPlan:
    """Return the plan with the largest lengths that cost at most ``strategy.cost`` of full attention's critical path.

    ``strategy`` has anchor_len, passing_len and cost; without its cost it says how many bytes may be sent at most.
    Raises UserError for a share that cannot be met, or beside an explicit anchor_len.
    """
    given: Any = strategy
    if not 0 < given.cost <= 1 or given.anchor_len is not None:
        raise UserError(
            "strategy.cost is a share of full attention's cost, for which the anchor's length is chosen",
            given=f"strategy.cost={given.cost}, strategy.anchor_len={given.anchor_len}",
            allowed="more than 0, at most 1, without strategy.anchor_len",
            remedy="Write strategy.cost=0.1, for example.",
        )

    def plan(anchor: int | None, passing: int | None) -> PrefillPlan:
        options: dict[str, Any] = {"anchor_len": anchor, "passing_len": passing, "cost": None}
        return dataclasses.replace(strategy, **options).plan(lengths, hosts, shape, compressor)

    full = Full().plan(lengths, 1, shape)
    limits = {"flops": int(given.cost * critical_flops(full)), "sent": sent_bytes(plan(None, given.passing_len))}
    return plan(*lengths_within(plan, lengths, hosts, "strategy.cost", **limits))


def lengths_within(
    plan: MakePlan,
    lengths: PromptLengths,
    hosts: int,
    key: str,
    *,
    flops: int | None = None,
    sent: int | None = None,
) -> tuple[int | None, int]:
    """Return the largest anchor and passing lengths whose busiest host stays within ``flops`` and whose sending within
    ``sent`` bytes.

    FLOPs are spent on anchor and passing together, at the default's two to one; where bytes end that, on the anchor
    alone, as far as it sends no more. Bytes without FLOPs set the passing alone (anchor None). Raises UserError naming
    ``key`` for a cost below the smallest.
    """
    smallest = lengths.context // hosts
    first = plan(None, None).blocks[0][1]  # the anchor's context part stays inside block 0
    least, most = anchor_limits(lengths, first)

    def within(anchor: int | None, passing: int) -> bool:
        made = plan(anchor, passing)
        return (flops is None or critical_flops(made) <= flops) and (sent is None or sent_bytes(made) <= sent)

    def beside(passing: int) -> int | None:
        return None if flops is None else min(max(2 * passing, least), most)

    passing = _largest(smallest, lambda p: within(beside(p), p))
    if passing is None:
        made = plan(beside(0), 0)
        limits = [f"{x:,} {what}" for x, what in ((flops, "FLOPs"), (sent, "bytes")) if x is not None]
        raise UserError(
            "this cost is below what the strategy needs at its smallest",
            given=f"{key}: {' and '.join(limits)}",
            allowed=f"{critical_flops(made):,} FLOPs and {sent_bytes(made):,} bytes or more",
            remedy=f"Raise {key}, or use more hosts.",
        )
    anchor = beside(passing)
    if anchor is not None and sent is not None:
        more = _largest(most - anchor, lambda a: within(anchor + a, passing))
        anchor += more or 0
    return anchor, passing


def _largest(most: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number up to ``most`` that fits; costs grow with it. None when not even 0 does."""
    if not fits(0):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
