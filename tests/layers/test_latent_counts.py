"""Latent layers in plans: bytes, keys made and work in closed form are those of the schedules; exact to fp64."""

from __future__ import annotations

import types
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apb.layers.latent import Latent
from apb.models.adapter import Adapter
from apb.models.shape import model_shape
from apb.plan.exact import Spread
from apb.plan.flops import prefill_flops, query_flops
from apb.plan.shapes import PromptLengths
from apb.strategies import strategy
from burst.schedules import Compute
from tests.layers.test_latent_models import drawn, model
from tests.support.families import FAMILIES, build_family
from tests.support.tiny import tiny_engine

KIND = Latent(q_heads=6, nope=5, rope=3, kv_lora=7, v_dim=4)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(["ring", "burst", "allgather", "ulysses", "usp"]),
    where=st.sampled_from(["zigzag", "contiguous"]),
    hosts=st.integers(1, 9),
    context=st.integers(1, 90),
    group=st.integers(1, 9),
)
def test_counts_are_those_of_the_schedule(name: str, where: str, hosts: int, context: int, group: int) -> None:
    if hosts > context or (name == "usp" and hosts % group):
        return
    spread, sizes = Spread(name, where, context, hosts, group if name == "usp" else None), KIND.attention_shape(2)
    made = spread.program(sizes)
    for rank in range(hosts):
        heads = made.heads_of(rank)
        sent: Counter[str] = Counter()
        for (role, _), count in made.bytes_sent(rank, sizes).items():
            sent[role] += count
        assert {k: v for k, v in spread.sent(rank, sizes).items() if v} == {k: v for k, v in sent.items() if v}
        blocks = {step.kv_block for step in made.programs[rank] if isinstance(step, Compute)}
        keys = sum(made.key_blocks.counts[block] for block in blocks)
        assert spread.head_keys(rank, sizes) == keys * (KIND.q_heads if heads is None else heads.q_count)


def test_keys_of_others_are_made_once_a_host() -> None:
    shape, lengths, hosts = model("minicpm3").shape, PromptLengths(64, 0, 0, 10), 4
    (kind,) = shape.kinds
    whole = prefill_flops(strategy("full").plan(lengths, 1, shape), 0)
    plan = strategy("ring", layout="contiguous").plan(lengths, hosts, shape)
    made = (
        16 * (1 + 2 + 3) * kind.heads * 2 * 24 * (16 + 12)
    )  # latents of 24 make 16 numbers of a key and 12 of a value
    assert sum(prefill_flops(plan, r) for r in range(hosts)) == whole + made * shape.layers
    pairs = kind.heads * (10 * 16 * 2 * (24 + 8 + 24)) * shape.layers  # few queries meet latents as keys and as values
    assert query_flops(plan, 0) == 2 * shape.linear_params * 10 + pairs


def exact_norm(self: Any, hidden: Tensor) -> Tensor:
    """Normalise in the input's type: transformers' norms round to fp32 in between."""
    size = hidden.pow(2).mean(-1, keepdim=True)
    out: Tensor = self.weight * hidden * torch.rsqrt(size + self.variance_epsilon)
    return out


def in_fp64(family: str, **changes: Any) -> Adapter:
    made = build_family(family, torch.float64, **changes)
    for module in made.modules():
        if type(module).__name__.endswith("RMSNorm") and isinstance(module, nn.Module):
            module.forward = types.MethodType(exact_norm, module)
    return Adapter(made, model_shape(FAMILIES[family].config(**changes), torch.float64))


@pytest.mark.parametrize(
    "family, changes", [("minicpm3", {}), ("deepseek_v3", {"first_k_dense_replace": 2})], ids=["minicpm3", "v3"]
)
def test_many_hosts_are_one_to_fp64(family: str, changes: dict[str, Any]) -> None:
    adapter, prompt = in_fp64(family, **changes), drawn(83)
    one = tiny_engine(adapter, strategy("full"), 1)
    want = one.logits(one.prefill(prompt))
    for name in ("ring", "ulysses"):
        made = tiny_engine(adapter, strategy(name), 5)
        assert float((made.logits(made.prefill(prompt)) - want).abs().max()) < 1e-12
