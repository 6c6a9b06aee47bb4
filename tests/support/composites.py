"""Tiny composites of text and vision, and their checkpoints with the prefixes of every generation of files."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
_PIXTRAL = {"model_type": "pixtral", "head_dim": 16}
_CLIP, _SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}
_LLAMA4 = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
_QWEN = {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}

# By name: the text model's values, those of the vision model, others.
COMPOSITES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"sliding_window": 32}, _SIGLIP, {"mm_tokens_per_image": 1}),
    "gemma4": (
        {
            "sliding_window": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 256,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"head_dim": 16, "num_key_value_heads": 2},
        {"audio_config": None},
    ),
    "llama4": (
        {"intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 32},
        _LLAMA4,
        {},
    ),
    "mistral3": ({"model_type": "mistral", "sliding_window": None}, _PIXTRAL, {}),
    "mistral3-ministral3": ({"model_type": "ministral3", "sliding_window": None}, _PIXTRAL, {}),
    "mistral3-mistral4": ({"model_type": "mistral4", **_LATENT}, _PIXTRAL, {}),
    "qwen3_5": (_LINEAR, _QWEN, {}),
    "qwen3_5_moe": ({**_LINEAR, **_MOE}, _QWEN, {}),
    "llava": ({"model_type": "llama"}, _CLIP, {}),
    "llava_next": ({"model_type": "llama"}, _CLIP, {}),
    "llava_onevision": ({"model_type": "qwen2"}, _SIGLIP, {}),
    "internvl": ({"model_type": "qwen3"}, {"model_type": "internvl_vision"}, {}),
    "exaone4_5": ({"model_type": "exaone4", "sliding_window": 32}, {}, {}),
    "idefics3": ({"model_type": "llama"}, {}, {}),
    "smolvlm": ({"model_type": "llama"}, {}, {}),
}


def composite_config(name: str, **changes: Any) -> Any:
    """Return a composite's configuration; ``changes`` are the text model's."""
    text, vision, others = copy.deepcopy(COMPOSITES[name])
    values = {k: v for k, v in {**TEXT, **text, **changes}.items() if not (k == "head_dim" and v is None)}
    parts = {"text_config": values, "vision_config": {**_VISION, **vision}}
    return AutoConfig.for_model(name.partition("-")[0], **parts, **others)


def composite(config: Any) -> PreTrainedModel:
    """Return a random composite in fp32, whose norms are not all one."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
    return plain(model)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with experts computed one by one, which takes every width and type."""
    model.set_experts_implementation("eager")
    return model


def text_logits(model: Any, ids_S: Tensor) -> Tensor:
    """Return a whole run's logits (S, V) for text alone."""
    if isinstance(model, transformers.Llama4ForConditionalGeneration):
        model = model.language_model  # without images its own forward fails in transformers 5.24
    with torch.no_grad():
        logits_BSV: Tensor = model(input_ids=ids_S[None], use_cache=False).logits
    return logits_BSV[0]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def renamed(weights: dict[str, Tensor], prefixes: str) -> dict[str, Tensor]:
    """Return a checkpoint with its text tower's tensors named as ``older``, ``newer`` or ``mixed`` files name them."""
    out = {}
    for name, x in weights.items():
        tower = re.match(r"(?:model|language_model|text_model|\.)*((?:embed_tokens|layers|norm|lm_head).*)", name)
        older = prefixes == "older" or (prefixes == "mixed" and bool(re.search(r"layers\.[02]\.|model\.norm", name)))
        if tower is None:
            out[name] = x
        elif tower[1].startswith("lm_head"):
            out[f"language_model.{tower[1]}" if older else tower[1]] = x
        else:
            out[f"language_model.model.{tower[1]}" if older else f"model.language_model.{tower[1]}"] = x
    return out
