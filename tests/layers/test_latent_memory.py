"""The memory that plans state for latent layers is what prefills take, at DeepSeek's sizes, without values."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from apb.models.adapter import Adapter
from apb.models.rotation import _last_part
from apb.models.shape import model_shape
from apb.plan.memory import host_memory
from apb.prompt.prompt import Prompt, Question
from tests.plan.test_memory_plan import CHUNK, CONTEXT, HOSTS, SHAPE, Living
from tests.support import unreal
from tests.support.tiny import random_ids

LATENT = {
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 2,
}


@functools.cache
def large() -> Adapter:
    """Two dense layers with DeepSeek-V3's heads, a quarter of them, without values."""
    given = {name: size for name, size in SHAPE.items() if name != "head_dim"}
    config = DeepseekV3Config(**given | LATENT)
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb.models.adapter.probe", unreal.unprobed(_last_part))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        return Adapter(model, model_shape(config, torch.bfloat16))


@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize(
    "name, select, options",
    [
        ("full", None, {}),
        ("ring", None, {}),
        ("burst", None, {}),
        ("star", None, {}),
        ("apb", "norm", {}),
        ("apb", "query", {"anchor": "shared"}),
        ("spava", "query", {}),
    ],
)
def test_no_more_than_planned(
    name: str, select: str | None, options: dict[str, Any], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreal.pretend(monkeypatch)
    hosts = 1 if name == "full" else HOSTS
    seen = {rank: Living() for rank in range(hosts)}
    asked = Question(random_ids(2, 1), random_ids(40, 2), random_ids(20, 3), None)
    prompt = Prompt(random_ids(CONTEXT, 4, SHAPE["vocab_size"]), 5, asked)
    plan = unreal.prefill(large(), prompt, hosts, name, select, chunk=chunk, within=seen.__getitem__, **options)
    for rank, host in seen.items():
        planned = host_memory(plan, rank)
        most = planned["kv"] + planned["activations"]
        assert 0.7 * most <= host.peak <= most, f"host {rank}: {host.peak / most:.3f}"
        assert name == "full" or not host.long, f"host {rank}: as long as the context: {host.long[:3]}"
