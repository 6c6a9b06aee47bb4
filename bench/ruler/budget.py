"""Anchor and passing lengths for a given cost, found on plans alone: comparisons at equal FLOPs and equal bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from apb.plan import PrefillPlan, PromptLengths
from apb.setup import Setup
from apb.strategies import Strategy
from burst.errors import UserError


def critical_flops(plan: PrefillPlan) -> int:
    """Return the prefill FLOPs of the busiest host: the time that a prefill cannot go below."""
    return max(plan.prefill_flops(r) for r in range(plan.hosts))


def passing_bytes(plan: PrefillPlan) -> int:
    """Return the bytes that all hosts send before the question runs."""
    return sum(sum(plan.prefill_bytes(r).values()) for r in range(plan.hosts))


def fit(setup: Setup, lengths: PromptLengths, *, flops: int | None = None, sent: int | None = None) -> Strategy:
    """Return the strategy with the largest lengths whose busiest host stays within ``flops`` and whose passing within
    ``sent`` bytes.

    FLOPs are spent on anchor and passing together at the default's two to one; bytes set the passing alone. Raises
    UserError for a strategy without these lengths and for a cost below its smallest.
    """
    chosen = setup.strategy
    if not {"anchor_len", "passing_len"} <= {f.name for f in dataclasses.fields(chosen)}:
        raise UserError(
            f"strategy '{chosen.name}' has no lengths that could be fitted to a cost",
            given=f"strategy={chosen.name}",
            allowed="strategies with anchor_len and passing_len",
            remedy="Leave bench.flops and bench.bytes out for this strategy.",
        )

    def plan(**options: int) -> PrefillPlan:
        strategy = dataclasses.replace(chosen, **options)
        return strategy.plan(lengths, setup.hosts, setup.shape, setup.compressor)

    block = lengths.context // setup.hosts
    first = plan().host_plans[0].spans[0][1]  # the anchor's context part stays inside block 0
    least = min(lengths.head, first) + lengths.question

    def both(passing: int) -> dict[str, int]:
        return {"anchor_len": min(max(2 * passing, least), first + lengths.question), "passing_len": passing}

    options: dict[str, int] = {}
    if sent is not None:
        length = _largest(block, lambda p: passing_bytes(plan(passing_len=p)) <= sent)
        options = {"passing_len": _reached(length, "bench.bytes", sent)}
    if flops is not None and sent is None:
        length = _largest(block, lambda p: critical_flops(plan(**both(p))) <= flops)
        options = both(_reached(length, "bench.flops", flops))
    elif flops is not None:
        reach = first + lengths.question - least
        more = _largest(reach, lambda a: critical_flops(plan(anchor_len=least + a, **options)) <= flops)
        options["anchor_len"] = least + _reached(more, "bench.flops", flops)
    return dataclasses.replace(chosen, **options)


def _largest(most: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number up to ``most`` that fits; costs grow with it. None when not even 0 does."""
    if not fits(0):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _reached(length: int | None, key: str, given: int) -> int:
    if length is None:
        raise UserError(
            "this cost is below what the strategy needs at its smallest",
            given=f"{key}: {given:,}",
            allowed="more",
            remedy=f"Raise {key}, or use more hosts.",
        )
    return length
