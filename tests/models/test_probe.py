"""The probe at load: attention that is not causal over all tokens is rejected, whatever its family calls it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import transformers

from apb.layers.base import LayerKind
from apb.layers.full import Full
from apb.layers.softmax import Softmax
from apb.layers.window import Window
from apb.models.adapter import Adapter
from apb.models.checks import check_config
from apb.models.kinds import layer_kinds
from apb.models.shape import model_shape
from burst.errors import UserError
from tests.models.test_adapter import COMMON, CONFIGS
from tests.support.tiny import build
from tests.sweep.shrink import shrunk

FULL = ["full_attention"] * 2


def phimoe(**more: Any) -> Any:
    return transformers.PhimoeConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, **more)


STRAY: list[dict[str, Any]] = [{}, {"use_sliding_window": False}, {"layer_types": FULL}]


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("make", [phimoe, lambda **more: transformers.MistralConfig(**COMMON, **more)])
def test_keys_of_other_families_switch_no_window_off(make: Callable[..., Any], stray: dict[str, Any]) -> None:
    kinds = {window: model_shape(make(sliding_window=window, **stray), torch.float32).mixers for window in (64, None)}
    assert all(isinstance(kind, Window) and kind.window == 64 for kind in kinds[64])
    assert all(isinstance(kind, Full) for kind in kinds[None])


def test_a_window_that_is_switched_off_by_its_own_family_is_none() -> None:
    for config in (
        transformers.Qwen2Config(**COMMON, use_sliding_window=False, sliding_window=64),
        transformers.Qwen3Config(**COMMON, use_sliding_window=False, sliding_window=64),
        transformers.Gemma2Config(**COMMON, layer_types=FULL, sliding_window=64),
    ):
        assert all(isinstance(kind, Full) for kind in model_shape(config, torch.float32).mixers)


# Kinds read off otherwise than the model attends: the probe must see it.
WRONG: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "a window shorter than the probe": (lambda: phimoe(sliding_window=20), {}),
    "no window far longer than the probe": (lambda: phimoe(sliding_window=2047, layer_types=FULL), {}),
    "a window by layer": (
        lambda: transformers.Qwen2Config(
            **COMMON, use_sliding_window=True, sliding_window=2047, layer_types=["full_attention", "sliding_attention"]
        ),
        {},
    ),
    "a soft cap": (
        lambda: transformers.Gemma2Config(**COMMON, head_dim=12, layer_types=FULL),
        {"soft_cap": None},
    ),
    "another soft cap": (
        lambda: transformers.Gemma2Config(**COMMON, head_dim=12, layer_types=FULL),
        {"soft_cap": 40.0},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kind_that_the_model_is_not_is_seen_when_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, wrong = WRONG[name]
    config = make()

    def misread(base: Any, config: Any) -> tuple[LayerKind, ...]:
        found = [cast("Softmax", kind) for kind in layer_kinds(base, config)]
        if wrong:
            return tuple(dataclasses.replace(kind, **wrong) for kind in found)
        return tuple(Full(kind.q_heads, kind.kv_heads, kind.qk_dim, kind.v_dim) for kind in found)

    model = build(config)
    windows = {n: getattr(m, "sliding_window", None) for n, m in model.named_modules()}
    monkeypatch.setattr("apb.models.adapter.layer_kinds", misread)
    monkeypatch.setattr("apb.models.shape.layer_kinds", misread)
    with pytest.raises(UserError, match=r"is not of the kind|sliding_window|softcap"):
        Adapter(model, model_shape(copy.deepcopy(config), torch.float32))
    # What the probe narrows is as it was.
    assert {n: getattr(m, "sliding_window", None) for n, m in model.named_modules()} == windows
    assert model.config.sliding_window == config.sliding_window


def test_a_model_whose_mask_is_another_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.eager_attention_forward

    def looking_away(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        hidden = mask.clone()
        hidden[..., 20:, 3] = torch.finfo(hidden.dtype).min  # one key that late queries do not see
        return own(module, q, k, v, hidden, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", looking_away)
    with pytest.raises(UserError, match="is not of the kind"):
        Adapter(build(CONFIGS["llama"]()), model_shape(CONFIGS["llama"](), torch.float32))


def test_a_model_that_looks_at_which_attention_it_has_is_rejected() -> None:
    model = build(CONFIGS["llama"]())
    model.model.norm.register_forward_hook(
        lambda module, inputs, out: out * (2.0 if model.config._attn_implementation == "apb" else 1.0)
    )
    with pytest.raises(UserError, match="depends on more than"):
        Adapter(model, model_shape(CONFIGS["llama"](), torch.float32))


def test_tokens_that_see_others_outside_attention_are_rejected() -> None:
    """A short convolution changes a few tokens of a call only: no more than roundings may send to other experts."""
    config = transformers.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"], conv_L_cache=3)
    with pytest.raises(UserError, match="other tokens"):
        Adapter(build(config), model_shape(copy.deepcopy(config), torch.float32))
    model = build(CONFIGS["llama"]())
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: out + 0.1 * out.roll(1, dims=1))
    with pytest.raises(UserError, match="see others outside"):
        Adapter(model, model_shape(CONFIGS["llama"](), torch.float32))


def test_layers_in_several_lists_are_rejected() -> None:
    config = shrunk("hrm_text")
    with pytest.raises(UserError, match="one after another"):
        Adapter(build(config), model_shape(copy.deepcopy(config), torch.float32))


def test_queries_that_are_scaled_by_far_positions_are_turned_nowhere() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}
    rope |= {"original_max_position_embeddings": 256}
    config = transformers.Ministral3Config(**COMMON, head_dim=12, sliding_window=None, rope_parameters=rope)
    adapter = Adapter(build(config), model_shape(copy.deepcopy(config), torch.float32))
    with pytest.raises(UserError, match="cannot be turned on"):
        adapter.rotate(torch.zeros(1, 4, 1, 12), 300, 0)


def test_a_tiny_vocabulary_and_few_positions_can_be_probed() -> None:
    for vocab, positions in ((1, 40), (2, 40), (3, 40), (600, 1), (600, 2), (600, 20)):
        config = transformers.LlamaConfig(
            **COMMON | {"vocab_size": vocab, "max_position_embeddings": positions, "pad_token_id": None}
        )
        Adapter(build(config), model_shape(copy.deepcopy(config), torch.float32))


def test_a_quantised_checkpoint_is_refused_before_anything_is_loaded() -> None:
    for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "mxfp4"):
        config = transformers.LlamaConfig(**COMMON, quantization_config={"quant_method": method, "bits": 4})
        with pytest.raises(UserError, match=f"quantization_config.*{method}"):
            check_config(config)
