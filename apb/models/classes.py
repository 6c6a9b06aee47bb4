"""Classes of transformers' models: the one for a configuration's decoder, and the decoder inside a loaded model."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

# Decoders that transformers has and, in the releases we know, lists among models for images and text alone.
_UNLISTED = ("Mistral4",)


def causal_lm() -> Any:
    """Return transformers' automatic class of causal decoders, which knows those that it leaves out."""
    for name in _UNLISTED:
        config, model = (getattr(transformers, f"{name}{kind}", None) for kind in ("Config", "ForCausalLM"))
        if config is not None and model is not None:
            AutoModelForCausalLM.register(config, model, exist_ok=True)
    return AutoModelForCausalLM


def decoder(model: PreTrainedModel) -> Any:
    """Return the decoder below the LM head; ``base_model`` is the whole model where it looks for another name.

    Llama 4's text class has the prefix that its checkpoints give the whole of it.
    """
    base = model.base_model
    inner = getattr(model, "model", None)
    return inner if base is model and isinstance(inner, nn.Module) else base
