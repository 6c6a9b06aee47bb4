"""A strategy's lengths stretched to a given cost: comparisons at equal FLOPs and equal bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

from apb.engine.setup import Setup
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import PromptLengths
from apb.strategies import Strategy
from apb.strategies.budget import lengths_within
from burst.errors import UserError


def fit(setup: Setup, lengths: PromptLengths, *, flops: int | None = None, sent: int | None = None) -> Strategy:
    """Return the strategy with the largest lengths whose busiest host stays within ``flops`` and whose passing within
    ``sent`` bytes.

    Raises UserError for a strategy without these lengths and for a cost below its smallest.
    """
    chosen = setup.strategy
    if not {"anchor_len", "passing_len"} <= {f.name for f in dataclasses.fields(chosen)}:
        raise UserError(
            f"strategy '{chosen.name}' has no lengths that could be fitted to a cost",
            given=f"strategy={chosen.name}",
            allowed="strategies with anchor_len and passing_len",
            remedy="Leave bench.flops and bench.bytes out for this strategy.",
        )

    def stretched(anchor: int | None, passing: int | None) -> Strategy:
        given = {"anchor_len": anchor, "passing_len": passing}
        options: dict[str, Any] = {name: length for name, length in given.items() if length is not None}
        return dataclasses.replace(chosen, **options)

    def plan(anchor: int | None, passing: int | None) -> PrefillPlan:
        return stretched(anchor, passing).plan(lengths, setup.hosts, setup.shape, setup.compressor)

    key = "bench.flops" if sent is None else "bench.bytes" if flops is None else "bench.flops or bench.bytes"
    return stretched(*lengths_within(plan, lengths, setup.hosts, key, flops=flops, sent=sent))
