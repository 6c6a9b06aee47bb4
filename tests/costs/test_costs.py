"""What plans cost: rates, agreement with burst's own predictions, order among strategies, and strategy=auto."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apb.compress import compressor
from apb.costs import Cost, Network, Rates, assumed, cost, load
from apb.costs.exact import attention
from apb.costs.lockstep import Clock
from apb.costs.rates import read
from apb.layers.full import Full
from apb.plan.bytes import bytes_by_kind
from apb.plan.flops import prefill_flops, query_flops
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.strategies import STRATEGIES, strategy
from apb.strategies.auto import Auto
from burst.errors import UserError
from burst.planner.predict import predict
from burst.planner.topology import Topology
from tests.support.tiny import make_prompt, tiny_engine, tiny_llama

# Llama-3.1-8B in bf16.
FULL = Full(32, 8, 128, 128)
SHAPE = ModelShape(32, 4096, 14336, (FULL,) * 32, 128256, 6_979_321_856, 525_336_576, 8_030_261_248, 2, 2**24)
FAST = Network("fast", 8, 400.0, 5.0, 50.0, 15.0)
SLOW = Network("slow", 1, 0.5, 50.0, 0.5, 50.0)
FREE = Network("free", 1, 1e9, 0.0, 1e9, 0.0)
ONE = Rates("one rate", *((((1.0, 1e14),),) * 3), memory=1e30, select=1e30)


def planned(name: str, hosts: int, tokens: int = 131072) -> PrefillPlan:
    made = strategy(name)
    scorer = compressor("query") if made.takes_compressor else None
    return made.plan(PromptLengths(tokens, 24, 56, 64), hosts, SHAPE, scorer)


def costed(name: str, hosts: int, network: Network = FAST, rates: Rates = ONE, tokens: int = 131072) -> Cost:
    return cost(planned(name, hosts, tokens), rates, network)


def test_at_one_rate_and_without_a_network_costs_are_the_busiest_hosts_flops() -> None:
    """The table of limits: APB 12.2 times full attention, Spava's schedule 17, a zigzag ring 8, Star 8.6."""
    full = costed("full", 1, FREE).seconds
    for name, limit in (("ring", 8.0), ("star", 8.6), ("apb", 12.2), ("spava", 17.0)):
        plan, found = planned(name, 8), costed(name, 8, FREE)
        flops = max(prefill_flops(plan, r) + query_flops(plan, r) for r in range(8)) - 2 * SHAPE.head_params
        assert found.seconds == pytest.approx(flops / 1e14, rel=0.01)
        assert full / found.seconds == pytest.approx(limit, rel=0.05)
        assert found.exposed_s < 0.01 * found.seconds <= 0.01 * found.worst_s


@pytest.mark.parametrize("hosts, nodes", [(1, 1), (4, 4), (4, 1), (6, 3), (8, 4)])
@pytest.mark.parametrize("name", ["ring", "burst", "allgather", "ulysses", "usp"])
def test_exact_attention_costs_what_burst_predicts(name: str, hosts: int, nodes: int) -> None:
    plan = planned(name, hosts, 32768)
    assert plan.spread is not None
    network = replace(SLOW, hosts_per_node=hosts // nodes, intra_gb_per_s=4.0)
    where = network.topology(hosts)
    machine = replace(where.machine, flops=1e14, memory=1e30)
    schedule = plan.spread.program(FULL.attention_shape(2), where.nodes)
    want = predict(schedule, FULL.attention_shape(2), Topology(where.nodes, machine))
    clock = Clock(where)
    clock.run(attention(plan, FULL, ONE, where.nodes))
    # Here a pair of blocks counts as one call at one rate, there each piece by itself; ports go in another order.
    assert clock.ends[0] == pytest.approx(want.total_s, rel=0.03)
    assert dict(zip(("intra", "inter"), clock.sent, strict=True)) == {"intra": 0.0, "inter": 0.0, **want.sent_bytes}


def test_bytes_are_the_plans() -> None:
    for name in STRATEGIES:
        if name in ("full", "auto"):
            continue
        plan, found = planned(name, 8), costed(name, 8)
        kinds = bytes_by_kind(plan, plan.lengths.query)
        assert sum(found.sent.values()) == sum(kinds.values()) - kinds["agree"], name
        assert found.sent["inter"] == 0 and found.memory >= SHAPE.total_params * 2


def test_a_slow_network_is_exposed_and_more_so_without_overlap() -> None:
    for name in ("ring", "apb", "spava"):
        fast, slow = costed(name, 8), costed(name, 8, SLOW)
        assert slow.seconds > fast.seconds and slow.exposed_s > fast.exposed_s
        assert slow.worst_s > slow.seconds and fast.worst_s >= fast.seconds
    # APB sends an eighth of what a ring does.
    assert costed("apb", 8, SLOW).worst_s < 0.5 * costed("ring", 8, SLOW).worst_s


def test_curves_are_read_on_a_logarithmic_scale() -> None:
    curve = ((10.0, 1.0), (1000.0, 3.0))
    assert [read(curve, x) for x in (1, 10, 100, 1000, 10**6)] == pytest.approx([1, 1, 2, 3, 3])


def test_rates_survive_their_file(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "rates.json"
    rates = replace(ONE, linear=((16.0, 1e12), (64.0, 2e12)), rest_s=1e-9)
    rates.save(file, note="where from")
    assert load(file) == rates and json.loads(file.read_text())["note"] == "where from"
    nothing = json.dumps({"rates": {**json.loads(file.read_text())["rates"], "memory": 0}})
    for broken in ('{"rates": {}}', "no json", nothing):
        file.write_text(broken)
        with pytest.raises(UserError, match="cannot be read"):
            load(file)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "nowhere.json")
    assert assumed("cpu").memory > 0
    with pytest.raises(UserError, match="Did you mean cuda"):
        assumed("cdua")


def test_networks() -> None:
    assert FAST.nodes(10) == (0,) * 8 + (1,) * 2 and FAST.topology(9).link(0, 8).bandwidth == 50e9
    for changes in ({"hosts_per_node": 0}, {"inter_gb_per_s": 0.0}, {"intra_us": -1.0}, {"intra_us": float("nan")}):
        with pytest.raises(UserError, match="out of range"):
            replace(FAST, **changes)


# -- strategy=auto ------------------------------------------------------------------------------------------


def test_auto_returns_the_plan_that_costs_least() -> None:
    lengths, scorer = PromptLengths(131072, 24, 56, 64), compressor("query")
    auto = Auto()
    found = {plan.strategy: c.worst_s for plan, c in auto.costs(lengths, 8, SHAPE, scorer)}
    assert set(found) == set(STRATEGIES) - {"auto", "full"}
    chosen = auto.plan(lengths, 8, SHAPE, scorer)
    assert found[chosen.strategy] <= min(found.values()) * 1.01
    assert chosen.digest == strategy(chosen.strategy).plan(lengths, 8, SHAPE, scorer).digest
    exact = Auto(exact=True).plan(lengths, 8, SHAPE, scorer)
    fastest = min(found[name] for name in ("ring", "burst", "allgather", "ulysses", "usp"))
    assert exact.exact and found[exact.strategy] <= fastest * 1.01
    assert auto.plan(lengths, 1, SHAPE, scorer).strategy == "full"
    with pytest.raises(UserError, match="more hosts than context tokens"):
        auto.plan(PromptLengths(3, 0, 1, 1), 4, SHAPE, scorer)


def test_a_slow_network_changes_autos_mind() -> None:
    lengths, scorer = PromptLengths(16384, 24, 56, 64), compressor("query")
    slow = Auto(hosts_per_node=1, inter_gb_per_s=0.05, inter_us=1000.0)
    assert Auto().plan(lengths, 8, SHAPE, scorer).strategy != slow.plan(lengths, 8, SHAPE, scorer).strategy == "star"


def test_what_auto_costed_is_what_runs() -> None:
    engine = tiny_engine(tiny_llama(torch.float32), Auto(machine="cpu"), 3, "query")
    prompt = make_prompt(300)
    plan = engine.setup.plan(prompt)
    handle = engine.prefill(prompt)
    assert handle.metrics["strategy"] == plan.strategy != "auto"
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(plan, prompt.lengths.query)
    assert len(engine.generate(handle, max_new_tokens=3).token_ids) == 3


def test_without_a_question_auto_leaves_out_what_needs_one() -> None:
    engine = tiny_engine(tiny_llama(torch.float32), Auto(machine="cpu"), 3, "query")
    handle = engine.prefill(make_prompt(300, question=0))
    assert handle.conditioned_on is None and handle.metrics["strategy"] not in ("apb", "spava")
    assert np.isfinite(handle.metrics["prefill_s"])
