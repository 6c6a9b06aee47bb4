"""Layer kinds of a model, read off its modules and configuration; ``apb.models.probe`` checks them at load."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from apb.layers.base import LayerKind
from apb.layers.full import Full
from apb.layers.window import Window
from apb.models.checks import refuse
from apb.models.latents import has_latents, latent_kind
from apb.models.linear import linear_kind, recurrence
from burst.errors import UserError

_OUTPUTS = ("o_proj", "out_proj", "dense", "wo")
_WINDOWED, _CHUNKED = "sliding_attention", "chunked_attention"


MIXER = "_apb_mixer"  # the attribute of a module that mixes tokens


@dataclass(frozen=True)
class Mixer:
    """A mixer's number in the model's order, and its kind."""

    number: int
    kind: LayerKind


def mixers(base: nn.Module) -> list[nn.Module]:
    """Return the modules that mix tokens, in the order in which the decoder runs them."""
    return [m for m in base.modules() if isinstance(getattr(m, "layer_idx", None), int) and _maker(m) is not None]


def layer_kinds(base: nn.Module, config: Any) -> tuple[LayerKind, ...]:
    """Return the kind and sizes of each mixer of a decoder, with storage or without.

    Raises UserError for a type of layer that is not supported.
    """
    found: list[LayerKind] = []
    makers: dict[str, int] = {}  # the last mixer that others may read, by its layer's type
    for number, module in enumerate(mixers(base)):
        make = _maker(module)
        assert make is not None
        kind_of_layer = _layer_type(module, config)
        reads = makers.get(kind_of_layer) if getattr(module, "is_kv_shared_layer", False) else None
        if reads is None:
            makers[kind_of_layer] = number
        found.append(make(module, config, reads))
    if not found:
        raise UserError(
            f"the layers of {type(base).__name__} mix tokens in no way that apb knows",
            given=f"model_type={getattr(config, 'model_type', '?')}",
            allowed="decoders with q, k and v projections, latents or linear recurrences (docs/models.md)",
            remedy="Choose another model.",
        )
    return tuple(found)


def _maker(module: nn.Module) -> Callable[[nn.Module, Any, int | None], LayerKind] | None:
    if recurrence(module) is not None:  # some of them have projections of such names
        return lambda found, _config, _reads: linear_kind(found)
    if has_latents(module):
        return _latent
    if has_projections(module):
        return _softmax
    return None


def _latent(module: nn.Module, config: Any, reads: int | None) -> LayerKind:
    if reads is not None:
        raise refuse("kv_sharing", "latents of another layer")
    return latent_kind(module)


def has_projections(module: nn.Module) -> bool:
    """Return True where queries, and keys and values unless another layer's are read, are plain projections."""
    if hasattr(module, "qkv_proj"):
        return True
    reads = getattr(module, "is_kv_shared_layer", False)
    return hasattr(module, "q_proj") and (reads or all(hasattr(module, f"{name}_proj") for name in "kv"))


def _softmax(module: Any, config: Any, reads: int | None) -> LayerKind:
    qk_dim = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    v_dim = getattr(module, "v_head_dim", None) or qk_dim
    out = next((getattr(module, name) for name in _OUTPUTS if hasattr(module, name)), None)
    q_heads = out.in_features // v_dim if isinstance(out, nn.Linear) else config.num_attention_heads
    sizes = {
        "q_heads": q_heads,
        "kv_heads": _kv_heads(module, config, q_heads, qk_dim),
        "qk_dim": qk_dim,
        "v_dim": v_dim,
        "sink": getattr(module, "sinks", None) is not None,
        "soft_cap": getattr(module, "attn_logit_softcapping", None) if _asks(module, "softcap") else None,
        "reads": reads,
    }
    if _layer_type(module, config) == _CHUNKED:
        return Window(**sizes, window=int(config.attention_chunk_size), chunked=True)
    window = _window(module, config)
    return Full(**sizes) if window is None else Window(**sizes, window=window)


def _kv_heads(module: Any, config: Any, q_heads: int, qk_dim: int) -> int:
    k_proj = getattr(module, "k_proj", None)
    if isinstance(k_proj, nn.Linear):
        return k_proj.out_features // qk_dim
    groups = getattr(module, "num_key_value_groups", None)
    if isinstance(groups, int):
        return q_heads // groups
    return int(getattr(config, "num_key_value_heads", None) or q_heads)


def _layer_type(module: Any, config: Any) -> str:
    """Return what the configuration says of a mixer's layer; empty where it says nothing."""
    types = getattr(config, "layer_types", None) if "layer_types" in _own(config) else None
    if not types:
        return ""
    found = str(types[module.layer_idx])
    if found not in _KNOWN:
        raise refuse("layer_types", found)
    return found


_KNOWN = ("full_attention", _WINDOWED, _CHUNKED, "attention", "linear_attention", "mamba", "hybrid", "moe", "mlp")


def _window(module: Any, config: Any) -> int | None:
    """Return the keys that a layer's window holds, the token's own included; None for attention over all tokens."""
    layer_type = _layer_type(module, config)
    if layer_type and layer_type != _WINDOWED:
        return None
    own = getattr(module, "sliding_window", None)
    if "sliding_window" in vars(module) or layer_type:
        return own if own is not None or not layer_type else config.sliding_window
    if "use_sliding_window" in _own(config) and config.use_sliding_window is False:
        return None
    found: int | None = getattr(config, "sliding_window", None) if "sliding_window" in _own(config) else None
    return found


def _asks(module: nn.Module, keyword: str) -> bool:
    """Return True where a module hands attention a keyword; Gemma 3 has a soft cap that it never hands on."""
    code = inspect.unwrap(type(module).forward).__code__
    return any(isinstance(each, tuple) and keyword in each for each in code.co_consts)


def _own(config: Any) -> Any:
    """Return the keys that this kind of configuration has; another family's are never read by its model."""
    return inspect.signature(type(config).__init__).parameters
