"""Memory of models with several kinds of layers: what a plan states by kind, and what lives without values."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from apb.models.adapter import Adapter
from apb.models.shape import model_shape
from apb.plan.memory import Generation, host_memory, memory_by_kind
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import PromptLengths
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from tests.plan.test_memory_plan import CHUNK, CONTEXT, HOSTS, SHAPE, Living
from tests.support import unreal
from tests.support.tiny import random_ids

WINDOW = 1024
TYPES = {"mixed": ["sliding_attention", "full_attention"], "windows": ["sliding_attention"] * 2}


def config(types: str) -> Any:
    """Two layers of an 8B model with windows."""
    sizes = SHAPE | {"sliding_window": WINDOW, "layer_types": TYPES[types]}
    return AutoConfig.for_model("gemma3_text", **sizes)


@functools.cache
def large(types: str) -> Adapter:
    """The same, without values."""
    return unreal.without_values(config(types))


@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize("name, select", [("full", None), ("ring", None), ("star", None), ("apb", "query")])
@pytest.mark.parametrize("types", TYPES)
def test_no_more_than_planned(
    types: str, name: str, select: str | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreal.pretend(monkeypatch)
    hosts = 1 if name == "full" else HOSTS
    seen = {rank: Living() for rank in range(hosts)}
    asked = Question(random_ids(2, 1), random_ids(40, 2), random_ids(20, 3), None)
    prompt = Prompt(random_ids(CONTEXT, 4, SHAPE["vocab_size"]), 5, asked)
    plan = unreal.prefill(large(types), prompt, hosts, name, select, chunk=chunk, within=seen.__getitem__)
    shares = []
    for rank, host in seen.items():
        planned = host_memory(plan, rank)
        shares.append(host.peak / (planned["kv"] + planned["activations"]))
        assert name == "full" or not host.long, f"host {rank}: as long as the context: {host.long[:3]}"
    # The first host of a ring in zigzag merges parts of half its rows.
    assert min(shares) > 0.6 and 0.7 <= max(shares) <= 1, shares


def planned(context: int, hosts: int = 8) -> PrefillPlan:
    shape = model_shape(config("mixed"), torch.bfloat16)
    return strategy("ring").plan(PromptLengths(context, 24, 56, 64), hosts, shape)


def test_what_each_kind_holds() -> None:
    plan, row = planned(2**20), 2 * 8 * 128 * 2
    for rank in (0, 7):
        kinds, later = memory_by_kind(plan, rank, Generation(100)), 64 + 100
        assert kinds["full"]["kept"] == row * (plan.host_plans[rank].block_len + (later if rank == 7 else 0))
        assert kinds["window"]["kept"] == row * (WINDOW - 1 + later)  # on every host
        assert sum(each["kept"] for each in kinds.values()) == host_memory(plan, rank, Generation(100))["kv"]
        assert kinds["full"]["exchanged"] > 10 * kinds["window"]["exchanged"] > 0
        assert {each["layers"] for each in kinds.values()} == {1}


def test_windows_hold_and_exchange_as_much_at_any_length() -> None:
    short, long = (memory_by_kind(planned(n), 3)["window"] for n in (2**17, 2**20))
    assert short["kept"] == long["kept"] and short["exchanged"] == long["exchanged"]
