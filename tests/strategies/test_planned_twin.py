"""The twin that reads any plan agrees with the one that works lengths out again, and with what hosts compute."""

from __future__ import annotations

import pytest
import torch

from apb.compress import COMPRESSORS, compressor
from apb.strategies import STRATEGIES, strategy
from tests.support import tiny
from tests.support.planned import planned_sizes, planned_twin
from tests.support.tiny import make_prompt, tiny_engine, tiny_llama
from tests.support.twin import sizes


@pytest.mark.parametrize("hosts", [2, 3])
@pytest.mark.parametrize("name", ["star", "apb", "spava"])
def test_lengths_read_from_plans_are_those_worked_out(name: str, hosts: int) -> None:
    for select in ("query", "norm") if name != "star" else (None,):
        made = compressor(select) if select else None
        prompt = make_prompt(97)
        plan = strategy(name).plan(prompt.lengths, hosts, tiny_llama(torch.float64).shape, made)
        found, want = planned_sizes(plan, prompt, select == "query"), sizes(name, prompt, hosts, select=select)
        assert found.spans == want.spans and found.held == want.held and found.beside == want.beside
        assert (found.anchor, found.skip) == (want.anchor, want.skip)
        assert found.rows[:-1] == want.rows[:-1]  # no block is behind the last one


@pytest.mark.parametrize("name", sorted({*STRATEGIES} - {"auto"}))
def test_every_strategy_equals_the_twin_of_its_plan(name: str) -> None:
    adapter, prompt = tiny_llama(torch.float64), make_prompt(97)
    takes = STRATEGIES.get(name).takes_compressor
    engine = tiny_engine(adapter, strategy(name), 1 if name == "full" else 2, "query" if takes else None)
    handle = engine.prefill(prompt)
    want = planned_twin(adapter, tiny.rotation(adapter), prompt, engine.setup.plan(prompt), engine.setup.compressor)
    assert (engine.logits(handle) - want.logits).abs().max() < 1e-9


@pytest.mark.parametrize("name", sorted({*COMPRESSORS} - {"retaining"}))  # whose heads belong to a model
def test_every_compressor_scores_in_the_twin(name: str) -> None:
    adapter, prompt = tiny_llama(torch.float64), make_prompt(97)
    engine = tiny_engine(adapter, strategy("apb"), 3, name)
    handle = engine.prefill(prompt)
    want = planned_twin(adapter, tiny.rotation(adapter), prompt, engine.setup.plan(prompt), engine.setup.compressor)
    assert any(want.sizes.rows) and (engine.logits(handle) - want.logits).abs().max() < 1e-9
