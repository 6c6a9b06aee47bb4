"""Checks of what models ask of attention: what distributed prefill does not do is rejected.

A configuration is checked before anything is loaded, every call of attention by its keywords; ``apb.models.probe`` runs
a loaded model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apb.models.quantised import check_quantisation
from apb.models.shape import rope_parameters
from apb.models.towers import TOWERS
from burst.errors import UserError

# Keywords that carry something attention would have to do; anything but None (or 0) is rejected.
_REFUSED = (
    "sliding_window",
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "indices",
    "block_indices",
    "attention_mask",
    "chunk_size",
    "head_mask",
    "dropout",
)
# Frequencies that change with the sequence length: hosts that see different positions would rotate differently.
_REFUSED_ROPE = ("dynamic",)


class PlainCall(UserError):
    """Attention was called without ours: somebody ran the model, or the model lost the keyword on the way."""


def refuse(name: str, value: object) -> UserError:
    """Return the error for something unsupported that an architecture asks of attention."""
    return UserError(
        f"this model asks attention for '{name}', which distributed prefill does not support",
        given=f"{name}={value if not isinstance(value, Tensor) else 'a tensor'}",
        allowed="causal attention over all tokens: no window, soft cap, sinks, mask or dropout",
        remedy="Choose another model, or a checkpoint whose config.json does not set it.",
    )


def check_keywords(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse what one call of attention asks for and would not get; raises UserError."""
    for name in _REFUSED:
        value = given.get(name)
        if value is not None and (isinstance(value, Tensor) or value != 0):
            raise refuse(name, value)
    if given.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise refuse("is_causal", False)


def check_config(config: Any) -> None:
    """Reject what a configuration asks of attention, or of the weights, that is not supported; raises UserError."""
    check_quantisation(config)
    if getattr(config, "is_encoder_decoder", False):
        raise refuse("is_encoder_decoder", True)
    if config.get_text_config() is not config:
        raise _composite(getattr(config, "model_type", "?"))
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise refuse("use_bidirectional_attention", config.use_bidirectional_attention)
    # A key that this kind of configuration does not have is another family's: its model never reads it.
    own = inspect.signature(type(config).__init__).parameters
    layer_types = getattr(config, "layer_types", None) if "layer_types" in own else None
    kinds = set(layer_types or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise refuse("layer_types", sorted(kinds))
    window = getattr(config, "sliding_window", None)
    switched_off = "use_sliding_window" in own and config.use_sliding_window is False
    if window is not None and ("sliding_attention" in kinds or not (switched_off or layer_types)):
        raise refuse("sliding_window", window)
    for name in ("attn_logit_softcapping", "attention_chunk_size", "alibi"):
        if getattr(config, name, None):
            raise refuse(name, getattr(config, name))
    ropes = rope_parameters(config)
    for rope in ropes:
        if rope.get("rope_type") in _REFUSED_ROPE:
            raise refuse("rope_type", rope["rope_type"])
    if not ropes and getattr(config, "rope_theta", None) is None:
        raise refuse("positions other than RoPE", getattr(config, "model_type", "?"))


def _composite(kind: str) -> UserError:
    return UserError(
        f"models of the kind {kind} take other inputs than text, and no text tower of theirs is known",
        given=f"model_type={kind}",
        allowed=f"decoders of text, and the text towers of {', '.join(sorted(TOWERS))}",
        remedy="Choose one of these, or a checkpoint of the text model alone.",
    )
