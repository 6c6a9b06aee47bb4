"""Shrunk configurations of any architecture: few layers that cover each kind of layer, small widths, narrow windows."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.family_base import INIT, VOCAB, WINDOW
from tests.sweep.patches import PATCHES

MOST_LAYERS = 6
POSITIONS = 4096

# Whole numbers by name, the first rule that fits; other numbers stay.
RULES: tuple[tuple[str, int], ...] = (
    (r"(pad|bos|eos|sep|cls|mask|decoder_start|image|audio|video|boi|eoi|boa|eoa)\w*_token_id", 1),
    (r"\w*vocab_size\w*", VOCAB),
    (r"qk_nope_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"v_head_dim", 16),
    (r"qk_head_dim", 24),
    (r"kv_lora_rank", 24),
    (r"[qo]_lora_rank", 32),
    (r"\w*(head_dim|headdim|head_size|kv_channels|dim_head)\w*", 16),
    (r"(\w*num_key_value_heads|num_kv_heads|n_head_kv)", 2),
    (r"(\w*num_attention_heads|\w*attention_heads|n_heads?|num_heads|num_query_groups)", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_num(_value)?_heads", 4),
    (r"(moe_)?(num|n)_?(local|routed)?_?experts", 4),
    (r"(num_experts_per_(tok|token)|top_k_experts|moe_topk|moe_top_k|moe_k|num_selected_experts|topk)", 2),
    (r"(n_group|topk_group|num_expert_group)", 1),
    (r"\w*(expert|moe)\w*(intermediate|ffn_hidden)_?size\w*", 32),
    (r"\w*(intermediate_size|ffn|ff_dim|dim_ff|dff|feed_forward_size|ffn_hidden_size)\w*", 96),
    (r"(hidden_size|d_model|n_embd|emb_dim|embedding_size|embedding_dim|word_embed_proj_dim)", 64),
    (r"(input|output)_embedding_size|lru_width|ple_embed_dim", 64),
    (r"hidden_size_per_layer_input", 8),
    (r"query_pre_attn_scalar", 16),
    (r"(\w*window\w*|\w*chunk_size|\w*chunk_length|local_attention|index_topk)", WINDOW),
    (r"(\w*d_state|\w*state_size)", 16),
    (r"(max_position_embeddings|model_max_length|max_seq_len|n_positions|n_ctx|max_target_positions)", POSITIONS),
    (r"(rotary_dim|rotary_ndims)", 8),
)
DEPTH = re.compile(r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|depth|num_blocks)")
# Left open by some configurations, whose models then cannot be built.
WHERE_NONE = {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
NEVER_ABOVE = ("token_id", "window", "chunk", "max_", "n_positions", "n_ctx", "n_group", "topk_group", "index_topk")


def shrunk(model_type: str) -> Any:
    """Return a small configuration of that type, its text tower and other towers small as well."""
    make = CONFIG_MAPPING[model_type]
    options = small(make(), depth=2)
    patch = PATCHES.get(model_type, {})
    for name, value in patch.items():
        options[name] = (
            {**options.get(name, {}), **value} if isinstance(value, Mapping) and name.endswith("_config") else value
        )
    return make(**copy.deepcopy(options))


def small(config: Any, depth: int) -> dict[str, Any]:
    """Return options that make a configuration like this one small."""
    towers = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    known = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set(vars(config))
    options: dict[str, Any] = {name: small(tower, depth) for name, tower in towers.items() if tower is not None}
    layers = _layers(config, depth)
    for name in sorted(known - set(towers)):
        value = vars(config).get(name)
        if value is None and name in WHERE_NONE:
            options[name] = WHERE_NONE[name]
        elif DEPTH.fullmatch(name) and type(value) is int:
            options[name] = min(value, len(layers[1]))
        elif isinstance(value, list | tuple) and len(value) == layers[0]:
            options[name] = [value[i] for i in layers[1]]
        elif type(value) is int:
            wanted = next((number for rule, number in RULES if re.fullmatch(rule, name)), value)
            options[name] = min(value, wanted) if any(part in name for part in NEVER_ABOVE) else wanted
            if options[name] == value:
                del options[name]
    if (
        "kv_lora_rank" in known and "num_key_value_heads" in options
    ):  # latents are one head for all, or for each its own
        options["num_key_value_heads"] = options["num_attention_heads"]
    if "initializer_range" in known:
        options["initializer_range"] = INIT
    if "is_decoder" in known and not getattr(config, "is_encoder_decoder", False):
        options["is_decoder"] = True
    return options


def _layers(config: Any, depth: int) -> tuple[int, list[int]]:
    """Return how many layers the configuration has, and which of them cover all its sorts of layers."""
    count = max((v for n, v in vars(config).items() if DEPTH.fullmatch(n) and type(v) is int), default=0)
    count = count or getattr(config, "num_hidden_layers", 0) or depth
    by_layer = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == count]
    sorts = [tuple(str(v[i]) for v in by_layer) for i in range(count)]
    chosen = sorted({sorts.index(sort) for sort in sorts})[:MOST_LAYERS]
    for i in range(count):
        if len(chosen) >= min(depth, count):
            break
        if i not in chosen:
            chosen = sorted([*chosen, i])
    return count, chosen
