"""Options that shrinking by name does not find, by type of configuration."""

from __future__ import annotations

from typing import Any

from tests.support.family_base import FULL, SLIDING, VOCAB, with_types

_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": VOCAB,
}
_SWA = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24}
_SWA |= {"head_dim": 24, "qk_nope_head_dim": 16, "v_head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

PATCHES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "cohere_compass_text": with_types(SLIDING, FULL) | {"rope_parameters": {SLIDING: _ROPE, FULL: _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": with_types(SLIDING, FULL, SLIDING, FULL)
    | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": with_types("conv", FULL, "conv", FULL),
    "lfm2_moe": with_types("conv", FULL, "conv", FULL) | {"num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 32), "max_position_embeddings": 512},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "dots3_note_text": {f"swa_{name}": size for name, size in _SWA.items()},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}
