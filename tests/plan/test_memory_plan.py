"""The memory that a plan states is what a prefill takes: every tensor's storage is counted while it lives.

At an 8B model's sizes, on tensors without values. What operators use inside is not seen.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apb.models.adapter import Adapter
from apb.plan.memory import host_memory
from apb.plan.plan import PrefillPlan
from apb.prompt.prompt import Prompt, Question
from tests.support import unreal
from tests.support.tiny import llama_config, random_ids

CONTEXT, HOSTS = 24_000, 4
CHUNK = 1_500
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": CONTEXT + 100,  # longer than the context: ids are drawn from it without repeats
    "max_position_embeddings": 2**17,
}


class Living(TorchDispatchMode):
    """Adds up the storages that are alive, and looks for tensors as long as the context."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.long: list[str] = []
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for x in (x for x in tree_leaves(out) if isinstance(x, Tensor)):
            storage = x.untyped_storage()
            if storage._cdata in given or (x.dtype == torch.int64 and x.dim() <= 2):  # ids and positions
                continue
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            if x.is_floating_point() and CONTEXT <= max(x.shape[:-1], default=0) < SHAPE["vocab_size"]:
                self.long.append(f"{func} {tuple(x.shape)}")
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


@functools.cache
def large() -> Adapter:
    """Two layers of an 8B model, without values."""
    return unreal.without_values(llama_config(**SHAPE))


def measured(
    name: str, select: str | None, hosts: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[PrefillPlan, dict[int, Living]]:
    unreal.pretend(monkeypatch)
    seen = {rank: Living() for rank in range(hosts)}
    asked = Question(random_ids(2, 1), random_ids(40, 2), random_ids(20, 3), None)
    prompt = Prompt(random_ids(CONTEXT, 4, SHAPE["vocab_size"]), 5, asked)
    plan = unreal.prefill(large(), prompt, hosts, name, select, chunk=chunk, within=seen.__getitem__, **options)
    return plan, seen


@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize(
    "name, select, options",
    [
        ("full", None, {}),
        ("star", None, {}),
        ("apb", "query", {}),
        ("apb", "query", {"anchor": "shared"}),
        ("apb", "norm", {"passing": "allgather"}),
        ("spava", "query", {}),
        ("ring", None, {}),
        ("burst", None, {}),
    ],
)
def test_no_more_than_planned(
    name: str, select: str | None, options: dict[str, Any], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = 1 if name == "full" else HOSTS
    plan, seen = measured(name, select, hosts, chunk, monkeypatch, **options)
    for rank, host in seen.items():
        planned = host_memory(plan, rank)
        most = planned["kv"] + planned["activations"]
        least = 0.65 if rank == 0 and plan.spread is not None else 0.7  # in zigzag it merges parts of half its rows
        assert least * most <= host.peak <= most, f"host {rank}: {host.peak / most:.3f} of what is planned"
        assert name == "full" or not host.long, f"host {rank}: as long as the context: {host.long[:3]}"


@pytest.mark.parametrize("name", ["allgather", "ulysses", "usp"])
def test_gathering_strategies_hold_what_they_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These hold keys, or some heads, of more than their own tokens: planned as such."""
    plan, seen = measured(name, None, HOSTS, None, monkeypatch)
    for rank, host in seen.items():
        planned = host_memory(plan, rank)
        assert host.peak <= planned["kv"] + planned["activations"]


def test_the_count_sees_what_lives_and_what_is_long() -> None:
    with Living() as seen:
        a = torch.empty(1, CONTEXT, 8, device="meta", dtype=torch.bfloat16)
        b = a.transpose(1, 2)[:, :4] + 1
        del a
        b.add_(1)
        torch.empty(10, device="meta")
    assert seen.peak == (8 + 4) * CONTEXT * 2
    assert len(seen.long) == 1


@pytest.mark.parametrize("chunk", [None, CHUNK])
def test_long_blocks_over_hosts(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what stays through a layer outweighs a chunk."""
    monkeypatch.setattr("tests.plan.test_memory_plan.CONTEXT", 150_000)
    monkeypatch.setitem(SHAPE, "vocab_size", 150_100)
    monkeypatch.setitem(SHAPE, "max_position_embeddings", 2**18)
    large.cache_clear()
    try:
        plan, seen = measured("ring", None, HOSTS, chunk, monkeypatch)
    finally:
        large.cache_clear()
    for rank, host in seen.items():
        planned = host_memory(plan, rank)
        assert 0.8 <= host.peak / (planned["kv"] + planned["activations"]) <= 1, f"host {rank}"
