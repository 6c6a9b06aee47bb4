"""Families with states or latents: gated delta rule, Mamba2, compressed keys and values."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.support.family_base import EXPERTS, FULL, LINEAR, ROPE, WARM, YARN, Family, layers, with_types

DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
ROUTED: dict[str, Any] = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
}

_THREE_TO_ONE = with_types(LINEAR, LINEAR, FULL, LINEAR)
_HYBRID = ("linear", "linear", "full", "linear")
_QUARTER = {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}, "head_dim": 32}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.5,
}


STATES: dict[str, Family] = {
    "qwen3_next": Family(
        hf.Qwen3NextConfig,
        _THREE_TO_ONE | _QUARTER | DELTA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
        _HYBRID,
    ),
    "qwen3_5": Family(hf.Qwen3_5TextConfig, _THREE_TO_ONE | _QUARTER | DELTA, _HYBRID),
    "qwen3_5_moe": Family(
        hf.Qwen3_5MoeTextConfig,
        _THREE_TO_ONE | _QUARTER | DELTA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
        _HYBRID,
    ),
    "deepseek_v2": Family(
        hf.DeepseekV2Config,
        layers(2) | LATENT | ROUTED | {"first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
        ("latent", "latent"),
        without=("head_dim",),
    ),
    "deepseek_v3": Family(
        hf.DeepseekV3Config,
        layers(2)
        | LATENT
        | ROUTED
        | {"first_k_dense_replace": 1, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        ("latent", "latent"),
        {"plain RoPE": {"rope_parameters": ROPE}},
        without=("head_dim",),
    ),
    "glm4_moe_lite": Family(
        hf.Glm4MoeLiteConfig,
        layers(2) | LATENT | ROUTED | {"v_head_dim": 24, "qk_nope_head_dim": 12},
        ("latent", "latent"),
        without=("head_dim",),
    ),
    "mistral4": Family(
        hf.Mistral4Config,
        layers(2) | LATENT | ROUTED | {"first_k_dense_replace": 1, "rope_parameters": dict(WARM)},
        ("latent", "latent"),
        {"temperature": {"rope_parameters": WARM | {"llama_4_scaling_beta": 0.0}}},
        without=("head_dim",),
    ),
    "minicpm3": Family(
        hf.MiniCPM3Config,
        layers(2) | LATENT | {"scale_emb": 3, "scale_depth": 1.0, "dim_model_base": 32},
        ("latent", "latent"),
        without=("head_dim",),
    ),
    "kimi_linear": Family(
        hf.KimiLinearConfig,
        with_types(LINEAR, LINEAR, FULL, LINEAR)
        | LATENT
        | EXPERTS
        | {"num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4, "model_max_length": 4096},
        ("linear", "linear", "latent", "linear"),
        without=("head_dim", "max_position_embeddings"),
    ),
    "nemotron_h": Family(
        hf.NemotronHConfig,
        {"layers_block_type": [LINEAR, "mlp", FULL, "moe", LINEAR, LINEAR]}
        | {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 12, "n_groups": 2, "chunk_size": 32}
        | EXPERTS
        | {"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 32},
        ("linear", "full", "linear", "linear"),
    ),
    "granitemoehybrid": Family(
        hf.GraniteMoeHybridConfig,
        with_types(LINEAR, FULL, LINEAR)
        | MAMBA
        | _MULTIPLIERS
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "shared_intermediate_size": 48},
        ("linear", "full", "linear"),
        without=("head_dim",),
    ),
    "granitemoehybrid-rope": Family(
        hf.GraniteMoeHybridConfig,
        with_types(LINEAR, FULL, LINEAR)
        | MAMBA
        | _MULTIPLIERS
        | {"num_local_experts": 0, "shared_intermediate_size": 48, "position_embedding_type": "rope"},
        ("linear", "full", "linear"),
        {"RoPE": {"position_embedding_type": None}},
        without=("head_dim",),
    ),
    "falcon_h1": Family(
        hf.FalconH1Config,
        layers(3)
        | MAMBA
        | {"mamba_d_ssm": 128, "mamba_rms_norm": True, "lm_head_multiplier": 0.7, "embedding_multiplier": 2.0}
        | {"key_multiplier": 0.8, "attention_out_multiplier": 1.2, "attention_in_multiplier": 0.9}
        | {"ssm_in_multiplier": 1.1, "ssm_out_multiplier": 0.8, "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 1.0]},
        ("linear", "full") * 3,
    ),
    "bamba": Family(
        hf.BambaConfig,
        layers(3) | MAMBA | {"attn_layer_indices": [1]},
        ("linear", "full", "linear"),
        without=("head_dim",),
    ),
    "olmo_hybrid": Family(
        hf.OlmoHybridConfig,
        with_types(LINEAR, FULL, LINEAR) | DELTA,
        ("linear", "full", "linear"),
        without=("head_dim",),
    ),
}
