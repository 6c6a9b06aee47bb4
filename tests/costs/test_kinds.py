"""Costs of models whose layers mix tokens in several ways: the sum over kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apb.compress import compressor
from apb.costs import cost
from apb.layers.full import Full
from apb.layers.window import Window
from apb.plan.bytes import bytes_by_kind, prefill_bytes
from apb.plan.flops import layer_flops, prefill_flops, query_flops
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.strategies import STRATEGIES, strategy
from tests.costs.test_costs import FAST, FREE, ONE, SLOW

# Gemma 3 27B's layers: five windows of 1,024 to one of attention to all tokens.
NEAR, FAR = Window(32, 16, 128, 128, window=1024), Full(32, 16, 128, 128)
MIXERS = ((NEAR,) * 5 + (FAR,)) * 10 + (NEAR,) * 2
SHAPE = ModelShape(62, 5376, 21504, MIXERS, 262208, 25_598_361_600, 1_409_630_208, 27_009_346_304, 2, 2**24)
NAMES = [name for name in STRATEGIES if name not in ("auto", "full")]


def planned(name: str, tokens: int = 131072, shape: ModelShape = SHAPE, hosts: int = 8) -> PrefillPlan:
    made = strategy(name)
    scorer = compressor("query") if made.takes_compressor else None
    return made.plan(PromptLengths(tokens, 24, 56, 64), hosts, shape, scorer)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_plans(name: str) -> None:
    plan = planned(name)
    kinds = bytes_by_kind(plan, plan.lengths.query)
    found = cost(plan, ONE, FAST)
    assert kinds["halo"] > 0 and sum(found.sent.values()) == sum(kinds.values()) - kinds["agree"]


@pytest.mark.parametrize("name", ["ring", "star", "apb"])
def test_at_one_rate_and_without_a_network_costs_are_the_busiest_hosts_flops(name: str) -> None:
    plan = planned(name)
    flops = max(prefill_flops(plan, r) + query_flops(plan, r) for r in range(8)) - 2 * SHAPE.head_params
    found = cost(plan, ONE, FREE)
    assert found.seconds == pytest.approx(flops / 1e14, rel=0.01)
    assert sum(found.mixing.values()) == pytest.approx(found.parts["attention"] + found.parts.get("selection", 0.0))
    assert set(found.mixing) == {"window", "full"}


def test_a_model_of_one_kind_costs_its_layers_alone() -> None:
    alone = {kind: replace(SHAPE, mixers=(kind,) * 62) for kind in (NEAR, FAR)}
    whole = cost(planned("ring"), ONE, SLOW)
    parts = {kind: cost(planned("ring", shape=shape), ONE, SLOW) for kind, shape in alone.items()}
    for name, kind, count in (("window", NEAR, 52), ("full", FAR, 10)):
        assert whole.mixing[name] == pytest.approx(parts[kind].mixing[name] * count / 62)
    assert whole.parts["linear"] == pytest.approx(parts[FAR].parts["linear"])
    mixed = (52 * parts[NEAR].worst_s + 10 * parts[FAR].worst_s) / 62
    assert whole.worst_s == pytest.approx(mixed, rel=0.01)


def test_windows_send_as_much_and_work_their_share_at_any_length() -> None:
    """Bytes independent of the length; pairs of a band, w (w + 1) / 2 of which its corner lacks."""
    for name in ("ring", "allgather", "star"):
        sent = [[prefill_bytes(planned(name, n), r)["halo"] for r in range(8)] for n in (131072, 1048576)]
        assert sent[0] == sent[1]
    for n in (131072, 1048576):
        plan, w = planned("ring", n), NEAR.window
        work = [layer_flops(plan, NEAR, r) for r in range(8)]
        assert sum(work) == NEAR.pair_flops * 32 * (n * w - w * (w - 1) // 2)
        assert max(work) <= 1.02 * sum(work) / 8


def test_approximating_pays_later_where_few_layers_see_all_tokens() -> None:
    """An anchor doubles the linear work of all layers, and saves attention in a sixth of them."""
    dense = replace(SHAPE, mixers=(FAR,) * 62)

    def crossing(shape: ModelShape) -> int:
        lengths = [2**k for k in range(15, 24)]
        times = {n: [cost(planned(x, n, shape), ONE, FAST).worst_s for x in ("star", "ring")] for n in lengths}
        return next(n for n in lengths if times[n][0] < times[n][1])

    assert crossing(SHAPE) >= 4 * crossing(dense)
