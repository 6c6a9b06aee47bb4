"""Families that attend: windows, chunks, sinks, soft caps, several RoPEs."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.support.family_base import (
    CHUNKED,
    EXPERTS,
    FULL,
    ROPE,
    SLIDING,
    VOCAB,
    WARM,
    WIDE,
    WINDOW,
    YARN,
    Family,
    layers,
    with_types,
)

LONG = 110  # tokens from which on LongRoPE turns otherwise


def _long_rope(original: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": ROPE | {"rope_type": "longrope", "original_max_position_embeddings": original} | factors,
    }


def _by_type(**full: Any) -> dict[str, Any]:
    return {"rope_parameters": {SLIDING: ROPE, FULL: ROPE | {"rope_theta": 1e6} | full}}


_GEMMA4 = {
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 0,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 4.0,
}

ATTENTION: dict[str, Family] = {
    "gpt_oss": Family(
        hf.GptOssConfig,
        with_types(SLIDING, FULL, SLIDING)
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
        | {"rope_parameters": YARN | {"truncate": False}},
        ("window", "full", "window"),
        WIDE,
    ),
    "gemma2": Family(
        hf.Gemma2Config,
        with_types(SLIDING, FULL, SLIDING)
        | {"query_pre_attn_scalar": 16, "sliding_window": WINDOW}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
        ("window", "full", "window"),
        WIDE | {"soft cap": {"attn_logit_softcapping": None}, "final soft cap": {"final_logit_softcapping": None}},
    ),
    "gemma3": Family(
        hf.Gemma3TextConfig,
        with_types(SLIDING, SLIDING, FULL)
        | _by_type(rope_type="linear", factor=8.0)
        | {"query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
        ("window", "window", "full"),
        WIDE | {"two RoPEs": {"rope_parameters": {SLIDING: ROPE, FULL: ROPE}}},
    ),
    "gemma4": Family(
        hf.Gemma4TextConfig,
        with_types(SLIDING, FULL, SLIDING, FULL, SLIDING, FULL)
        | _GEMMA4
        | {"attention_k_eq_v": True, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
        ("window", "full") * 3,
        WIDE,
    ),
    "gemma4-plain": Family(
        hf.Gemma4TextConfig, with_types(SLIDING, SLIDING, FULL) | _GEMMA4, ("window", "window", "full"), WIDE
    ),
    "gemma4-moe": Family(
        hf.Gemma4TextConfig,
        with_types(SLIDING, FULL)
        | _GEMMA4
        | {"attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 32},
        ("window", "full"),
        WIDE,
    ),
    "mistral-window": Family(hf.MistralConfig, layers(2) | {"sliding_window": WINDOW}, ("window", "window"), WIDE),
    "ministral3": Family(
        hf.Ministral3Config,
        layers(2) | {"rope_parameters": WARM},
        ("full", "full"),
        {"temperature": {"rope_parameters": WARM | {"llama_4_scaling_beta": 0.0}}},
    ),
    "ministral3-window": Family(
        hf.Ministral3Config,
        layers(2) | {"rope_parameters": WARM, "sliding_window": WINDOW},
        ("window", "window"),
        WIDE,
    ),
    "olmo3": Family(
        hf.Olmo3Config,
        with_types(SLIDING, SLIDING, FULL) | _by_type(**YARN) | {"sliding_window": WINDOW},
        ("window", "window", "full"),
        WIDE,
        without=("head_dim",),
    ),
    "mimo_v2_flash": Family(
        hf.MiMoV2FlashConfig,
        with_types(FULL, SLIDING, SLIDING, FULL)
        | EXPERTS
        | {"n_routed_experts": 4, "num_key_value_heads": 1, "head_dim": 24, "v_head_dim": 16, "sliding_window": WINDOW},
        ("full", "window", "window", "full"),
        WIDE | {"value scale": {"attention_value_scale": 1.0}},
    ),
    "cohere2": Family(
        hf.Cohere2Config,
        with_types(SLIDING, FULL, SLIDING) | {"sliding_window": WINDOW, "logit_scale": 0.25},
        ("window", "full", "window"),
        WIDE,
        without=("head_dim",),
    ),
    "exaone4": Family(
        hf.Exaone4Config,
        with_types(SLIDING, FULL, SLIDING) | {"sliding_window": WINDOW},
        ("window", "full", "window"),
        WIDE,
    ),
    "smollm3": Family(
        hf.SmolLM3Config,
        layers(2) | {"no_rope_layers": [1, 0]},
        ("full", "full"),
        {"NoPE": {"no_rope_layers": [1, 1]}},
        without=("head_dim",),
    ),
    "smollm3-window": Family(
        hf.SmolLM3Config,
        with_types(FULL, SLIDING) | {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
        ("full", "window"),
        WIDE,
        without=("head_dim",),
    ),
    "phi3-longrope": Family(
        hf.Phi3Config,
        layers(2) | _long_rope(LONG),
        ("full", "full"),
        {"long factors": _long_rope(1000)},
        without=("head_dim",),
    ),
    "phi3-window": Family(
        hf.Phi3Config,
        layers(2) | {"sliding_window": WINDOW, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
        ("window", "window"),
        WIDE,
        without=("head_dim",),
    ),
    "phi3-longrope-window": Family(
        hf.Phi3Config,
        layers(2) | _long_rope(LONG) | {"sliding_window": WINDOW},
        ("window", "window"),
        WIDE | {"long factors": _long_rope(1000)},
        without=("head_dim",),
    ),
    "llama4": Family(
        hf.Llama4TextConfig,
        with_types(CHUNKED, FULL, CHUNKED, FULL)
        | {"no_rope_layers": [1, 0, 1, 0], "attention_chunk_size": WINDOW, "intermediate_size_mlp": 96}
        | {"num_local_experts": 4, "moe_layers": [1, 2], "floor_scale": 24, "attn_scale": 0.5},
        ("window", "full", "window", "full"),
        {
            "chunks": {"attention_chunk_size": 4000},
            "temperature": {"attn_temperature_tuning": False},
            "NoPE": {"no_rope_layers": [1, 1, 1, 1]},
        },
    ),
}
