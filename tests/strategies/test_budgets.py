"""Budgets: anchor and passing lengths for a wanted cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from apb.compress import compressor
from apb.plan.bytes import sent_bytes
from apb.plan.flops import critical_flops
from apb.plan.shapes import PromptLengths
from apb.strategies import strategy
from burst.errors import UserError
from tests.strategies.test_spava import LARGE, SMALL

TAKING = ["apb", "spava"]
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("apb", {}),
    ("apb", {"passing": "allgather"}),
    ("apb", {"anchor": "shared"}),
    ("spava", {}),
]


# -- a wanted cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", FORMS, ids=str)
@pytest.mark.parametrize("context, shape", [(7300, SMALL), (1501, SMALL), (130_001, LARGE)])
@pytest.mark.parametrize("hosts", [2, 8, 16])
def test_a_cost_is_met_with_no_more_bytes(
    hosts: int, context: int, shape: Any, name: str, options: dict[str, Any]
) -> None:
    lengths = PromptLengths(context=context, head=24, question=20, query=30)
    fixed = strategy(name, **options).plan(lengths, hosts, shape, compressor("query"))
    full = critical_flops(strategy("full").plan(lengths, 1, shape))
    least = strategy(name, **options, passing_len=0, anchor_len=44).plan(lengths, hosts, shape, compressor("query"))
    before = 0
    for step in range(1, 5):
        cost = (critical_flops(least) + step / 4 * (1.3 * critical_flops(fixed) - critical_flops(least))) / full
        made = strategy(name, **options, cost=cost)
        plan = made.plan(lengths, hosts, shape, compressor("query"))
        assert critical_flops(plan) <= cost * full and sent_bytes(plan) <= sent_bytes(fixed)
        # What is left of the cost is less than a longer anchor would take, unless that would send more.
        longer = dataclasses.replace(made, cost=None, anchor_len=plan.anchor_len + 4, passing_len=max(plan.kept_rows))
        if name == "apb":
            same = dataclasses.replace(longer, anchor_len=plan.anchor_len)
            assert plan == same.plan(lengths, hosts, shape, compressor("query"))
        if name == "apb" and plan.anchor_len + 4 <= plan.blocks[0][1] + 20:
            more = longer.plan(lengths, hosts, shape, compressor("query"))
            assert critical_flops(more) > cost * full or sent_bytes(more) > sent_bytes(fixed)
        assert critical_flops(plan) >= before
        before = critical_flops(plan)
    assert before > critical_flops(least)


def test_a_cost_below_the_least_is_refused() -> None:
    lengths = PromptLengths(context=1500, head=24, question=20, query=30)
    for options in ({"cost": 0.01}, {"cost": 0.0}, {"cost": 1.5}, {"cost": 0.2, "anchor_len": 60}):
        with pytest.raises(UserError, match=r"strategy\.cost"):
            strategy("apb", **options).plan(lengths, 8, SMALL, compressor("query"))
    with pytest.raises(UserError, match=r"strategy\.cost"):
        strategy("spava", cost=0.5).plan(lengths, 1, SMALL, compressor("query"))
    fixed = strategy("apb", passing_len=10).plan(lengths, 8, SMALL, compressor("query"))
    capped = strategy("apb", passing_len=10, cost=0.2).plan(lengths, 8, SMALL, compressor("query"))
    assert max(capped.kept_rows) == 10 and capped.anchor_len > fixed.anchor_len
