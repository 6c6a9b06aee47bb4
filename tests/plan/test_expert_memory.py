"""Memory planned for mixtures of experts against the bytes that really live at once on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Glm4MoeConfig, GraniteMoeConfig, LlamaConfig, MixtralConfig, OlmoeConfig

from apb.clusters.virtual import VirtualCluster
from apb.engine.requests import prefill_request
from apb.engine.setup import Setup
from apb.host.messages import HostSpec
from apb.models.adapter import Adapter
from apb.models.shape import model_shape
from apb.plan.memory import host_memory
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from tests.support.tiny import build

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 512,
    "max_position_embeddings": 4000,
}
DENSE_FIRST = {"intermediate_size": 800, "head_dim": 16, "n_routed_experts": 8, "moe_intermediate_size": 32}
CONFIGS = {
    "llama": LlamaConfig(**BASE),
    "mixtral": MixtralConfig(**BASE, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**BASE, num_experts=16, num_experts_per_tok=8),
    "granite-moe": GraniteMoeConfig(**BASE, num_local_experts=16, num_experts_per_tok=8),
    "glm4-moe": Glm4MoeConfig(**{**BASE, **DENSE_FIRST}, num_experts_per_tok=2, first_k_dense_replace=1),
}


def prompt(tokens: int) -> Prompt:
    return Prompt(tuple(i % 400 + 3 for i in range(tokens)), 0, Question((), (5,), (), None))


@pytest.mark.parametrize("name", CONFIGS)
def test_visited_experts_are_in_the_plan(name: str) -> None:
    config = CONFIGS[name]
    adapter = Adapter(build(copy.deepcopy(config)), model_shape(copy.deepcopy(config), torch.float32))
    spec = HostSpec("tiny", "float32", "cpu")
    (host,) = VirtualCluster(spec, 1, adapter)._hosts
    setup = Setup(spec, adapter.shape, None, strategy("full"), None, 1)
    warm, asked = prompt(100), prompt(3000)
    host.prefill(prefill_request("warm", warm, setup.plan(warm), None, 0))
    host.release("warm")
    plan = setup.plan(asked)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        host.prefill(prefill_request("it", asked, plan, None, 0))
    assert seen.profiler is not None
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    planned = host_memory(plan, 0)
    assert 0.97 <= (planned["kv"] + planned["activations"]) / peak <= 1.15
