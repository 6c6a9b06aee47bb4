"""Approximate strategies on latent layers against a dense twin: rows that are chosen and passed are latents.

The twin makes keys and values head by head and chooses a latent by the mean of its heads' scores.

Shapes: H query heads, K kv heads, L block tokens, N tokens of the sequence, S tokens, D head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.compress import compressor
from apb.compress.base import check_fits
from apb.layers.call import AttentionCall
from apb.models.adapter import Adapter
from apb.plan.bytes import bytes_by_kind, prefill_bytes
from apb.strategies import strategy
from burst.errors import UserError
from tests.layers.test_latent_models import TOLERANCE, drawn, model
from tests.support.planned import planned_sizes
from tests.support.tiny import tiny_engine
from tests.support.twin import Rotate, _Dense

CONTEXT = 97


class LatentTwin(_Dense):
    """The dense twin over keys and values made of latents; all heads see what is chosen."""

    def __call__(self, call: AttentionCall) -> Tensor:
        by = call.latent
        assert by is not None
        c, r = call.k_BKSD[0, 0], call.v_BKSE[0, 0]
        k = torch.stack([torch.cat([c @ w[: by.nope].T, r], dim=1) for w in by.weight_HXR])
        v = torch.stack([c @ w[by.nope :].T for w in by.weight_HXR])
        return super().__call__(dataclasses.replace(call, k_BKSD=k[None], v_BKSE=v[None], latent=None))

    def _scores(self, layer: int, number: int, q_HND: Tensor, k_KLD: Tensor, scale: float) -> Tensor:
        return super()._scores(layer, number, q_HND, k_KLD, scale).mean(0, keepdim=True).repeat(len(k_KLD), 1)


def rotation(family: str, adapter: Adapter) -> Rotate:
    """Turn the last dimensions of queries on, written out: pairs (i, i + half), or (2i, 2i + 1) in DeepSeek-V2."""

    def rotate(x_HSD: Tensor, delta: int, layer: int) -> Tensor:
        angle = float(delta) * adapter._model.base_model.rotary_emb.inv_freq.float()
        cos, sin, half = angle.cos(), angle.sin(), len(angle)
        rest, turned = x_HSD[..., : -2 * half], x_HSD[..., -2 * half :]
        a, b = (turned[..., ::2], turned[..., 1::2]) if family == "deepseek_v2" else turned.split(half, dim=-1)
        pair = [a * cos - b * sin, b * cos + a * sin]
        both = torch.stack(pair, dim=-1).flatten(-2) if family == "deepseek_v2" else torch.cat(pair, dim=-1)
        return torch.cat([rest, both], dim=-1)

    return rotate


def check(family: str, name: str, hosts: int, select: str | None, chunk: int | None = None, **options: Any) -> None:
    adapter, prompt = model(family), drawn(CONTEXT)
    scorer = compressor(select) if select else None
    made = tiny_engine(adapter, strategy(name, **options), hosts, scorer)
    made.setup = dataclasses.replace(made.setup, chunk_tokens=chunk)
    handle, plan = made.prefill(prompt), made.setup.plan(prompt)
    found = planned_sizes(plan, prompt, scorer is not None and scorer.needs_question)
    dense = LatentTwin(prompt, found, select, rotation(family, adapter), adapter.shape.mixers)
    with torch.inference_mode():
        want = adapter.logits(dense.ids, dense.positions, dense)
    assert float((made.logits(handle) - want).abs().max()) < TOLERANCE
    assert handle.metrics["bytes_by_kind"] == bytes_by_kind(plan, prompt.lengths.query)


@pytest.mark.parametrize("select", ["query", "norm", "random", "recent"])
@pytest.mark.parametrize("family", ["minicpm3", "deepseek_v2", "deepseek_v3"])
def test_what_is_chosen_and_passed(family: str, select: str) -> None:
    check(family, "apb", 4, select)
    check(family, "apb", 3, select, anchor="shared", passing="allgather")
    check(family, "spava", 3, select)


@pytest.mark.parametrize("family", ["glm4_moe_lite", "mistral4"])
def test_anchors_alone(family: str) -> None:
    for hosts in (1, 2, 5):
        check(family, "star", hosts, None)
    check(family, "apb", 4, "norm")


def test_chunks_choose_the_same() -> None:
    for chunk in (1, 7, 64):
        check("glm4_moe_lite", "apb", 3, "norm", chunk)
        check("minicpm3", "spava", 2, "query", chunk)


@functools.cache
def passed(family: str, row: int, layers: int) -> None:
    plan = tiny_engine(model(family), strategy("apb"), 3, "norm").setup.plan(drawn(CONTEXT))
    rows = plan.kept_rows
    assert prefill_bytes(plan, 0)["passing"] == rows[0] * row * layers
    assert prefill_bytes(plan, 1)["passing"] == (rows[0] + rows[1]) * row * layers


def test_a_passed_row_is_a_latent() -> None:
    passed("minicpm3", (24 + 8) * 4, 2)


def test_what_sees_more_than_rotation_is_rejected() -> None:
    with pytest.raises(UserError, match="turned on"):
        tiny_engine(model("mistral4"), strategy("apb"), 3, "query").prefill(drawn(CONTEXT))


def test_heads_that_read_projections_are_rejected() -> None:
    with pytest.raises(UserError, match="projections"):
        check_fits(compressor("retaining"), model("minicpm3").shape)
