"""Checks of what models ask of attention: what distributed prefill does not do is rejected.

A configuration is checked before anything is loaded, every call of attention by its keywords; ``apb.models.probe`` runs
a loaded model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apb.layers.base import LayerKind
from apb.layers.softmax import Softmax
from apb.layers.window import Window
from apb.models.quantised import check_quantisation
from apb.models.rope import rope_parameters
from apb.models.towers import TOWERS
from burst.errors import UserError

# Keywords that carry something attention would have to do; anything but None (or 0) is rejected.
_REFUSED = (
    "sinks",
    "position_bias",
    "indices",
    "block_indices",
    "attention_mask",
    "chunk_size",
    "head_mask",
    "dropout",
)
# Of layers that choose each query's keys by scores of their own.
_INDEXERS = ("index_topk", "index_topk_blocks", "index_n_heads", "indexer_n_heads", "indexer_types", "indexer_budget")
# Frequencies that change with the sequence length: hosts that see different positions would rotate differently.
_REFUSED_ROPE = ("dynamic",)


class PlainCall(UserError):
    """Attention was called without ours: somebody ran the model, or the model lost the keyword on the way."""


def refuse(name: str, value: object) -> UserError:
    """Return the error for something unsupported that an architecture asks of attention."""
    return UserError(
        f"this model asks attention for '{name}', which distributed prefill does not support",
        given=f"{name}={value if not isinstance(value, Tensor) else 'a tensor'}",
        allowed="layers of docs/layers.md: full, windowed, latent and linear ones, with sinks and soft caps",
        remedy="Choose a model of docs/models.md, or a checkpoint whose config.json does not set it.",
    )


def check_kind(given: Mapping[str, Any], kind: LayerKind) -> None:
    """Refuse what one call of attention asks for that its layer's kind does not do; raises UserError."""
    expected = {
        "sliding_window": kind.window if isinstance(kind, Window) and not kind.chunked else None,
        "softcap": kind.soft_cap if isinstance(kind, Softmax) else None,
    }
    for name, value in expected.items():
        if (given.get(name) or None) != value and name in given:
            raise refuse(name, given[name])
    if given.get("s_aux") is not None and not (isinstance(kind, Softmax) and kind.sink):
        raise refuse("s_aux", given["s_aux"])


def check_keywords(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse what one call of attention asks for and no layer does; raises UserError."""
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
    own = inspect.signature(type(config).__init__).parameters  # a key of another family's is never read
    for name in ("alibi", *_INDEXERS):
        if name in own and getattr(config, name, None):
            raise refuse(name, getattr(config, name))
    for rope in rope_parameters(config):
        if rope.get("rope_type") in _REFUSED_ROPE:
            raise refuse("rope_type", rope["rope_type"])


def _composite(kind: str) -> UserError:
    return UserError(
        f"models of the kind {kind} take other inputs than text, and no text tower of theirs is known",
        given=f"model_type={kind}",
        allowed=f"decoders of text, and the text towers of {', '.join(sorted(TOWERS))}",
        remedy="Choose one of these, or a checkpoint of the text model alone.",
    )
