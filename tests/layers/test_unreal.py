"""Layers of all kinds on hosts without values: nothing is read or copied in a prefill, and memory is as planned."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import AutoModelForCausalLM

from apb.models.adapter import Adapter
from apb.models.ends import Ends
from apb.models.shape import model_shape
from apb.plan.memory import host_memory
from apb.prompt.prompt import Prompt, Question
from tests.plan.test_memory_plan import Living
from tests.strategies.test_no_syncs import NoUploads, NoValues
from tests.support import unreal
from tests.support.families import adapt_family
from tests.support.matrix import question
from tests.support.tiny import random_ids

CONTEXT, HOSTS = 7_000, 2
SIZES: dict[str, Any] = {
    "vocab_size": CONTEXT + 100,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2**17,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention"],
    "intermediate_size": 1024,
}
CONFIGS = {
    "delta": hf.Qwen3_5TextConfig(
        **SIZES,
        hidden_size=5120,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    ),
    "mamba2": hf.GraniteMoeHybridConfig(
        **SIZES,
        hidden_size=4096,
        shared_intermediate_size=1024,
        num_local_experts=0,
        mamba_n_heads=128,
        mamba_d_head=64,
        mamba_d_state=128,
    ),
}


@functools.cache
def tiny(family: str) -> Adapter:
    """A random model in bfloat16, checked, and then without values."""
    adapter = adapt_family(family, torch.bfloat16)
    adapter._model.to("meta")
    return adapter


@pytest.mark.parametrize("family", ("qwen3_5", "falcon_h1", "gemma2", "gemma3", "gemma4", "minicpm3"))
@pytest.mark.parametrize("name, chunk", [("ring", 48), ("apb", None)])
def test_prefills_never_wait_for_the_device(
    family: str, name: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny(family)
    unreal.pretend(monkeypatch)
    forward = Adapter._forward

    def run(self: Adapter, module: Any, ids_S: Tensor, positions_S: Tensor, attention: Any, **options: Any) -> Any:
        with NoUploads(), NoValues():
            return forward(self, module, ids_S, positions_S, attention, **options)

    monkeypatch.setattr(Adapter, "_forward", run)
    unreal.prefill(adapter, question(400, 1), 4, name, "norm" if name == "apb" else None, chunk=chunk)


@functools.cache
def large(recurrence: str) -> Adapter:
    """Two layers of the sizes of published models, without values."""
    config = CONFIGS[recurrence]
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb.models.adapter.probe", lambda adapter, model, rotation: Ends())  # compares values
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        return Adapter(model, model_shape(config, torch.bfloat16))


@pytest.mark.parametrize("recurrence", sorted(CONFIGS))
@pytest.mark.parametrize("hosts, chunk", [(1, None), (HOSTS, None), (HOSTS, 1000)])
def test_no_more_than_planned(recurrence: str, hosts: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    unreal.pretend(monkeypatch)
    seen = {rank: Living() for rank in range(hosts)}
    asked = Question(random_ids(2, 1), random_ids(40, 2), random_ids(20, 3), None)
    prompt = Prompt(tuple(range(CONTEXT)), 5, asked)
    name = "full" if hosts == 1 else "ring"
    plan = unreal.prefill(large(recurrence), prompt, hosts, name, chunk=chunk, within=seen.__getitem__)
    for rank, host in seen.items():
        planned = host_memory(plan, rank)
        most = planned["kv"] + planned["activations"]
        assert 0.7 * most <= host.peak <= most, f"host {rank}: {host.peak / most:.3f} of what is planned"
