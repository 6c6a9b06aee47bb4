"""What models ask of attention, and which of it distributed prefill does: the rest is refused by name.

A configuration is checked before anything is loaded, a loaded model by running two tokens through it, and every call of
attention by its keywords.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apb.attention.base import Attention
from apb.plan.shapes import ModelShape
from burst.errors import UserError

# Keywords that carry something attention would have to honour; anything but None (or 0) is refused by name.
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
_REFUSED_ROPE = ("dynamic", "longrope")
_PROBED_DISTANCE = 37  # positions between the two tokens of a probe; far enough to turn most pairs


class PlainCall(UserError):
    """Attention was called without ours: somebody ran the model, or the model lost the keyword on the way."""


def refuse(name: str, value: object) -> UserError:
    """Return the error for something an architecture asks of attention that is not honoured."""
    return UserError(
        f"this model asks attention for '{name}', which distributed prefill does not honour",
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
    """Refuse by name what a model's configuration asks of attention that is not honoured; raises UserError."""
    if getattr(config, "is_encoder_decoder", False):
        raise refuse("is_encoder_decoder", True)
    if config.get_text_config() is not config:
        raise refuse("other inputs than text", getattr(config, "model_type", "?"))
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise refuse("layer_types", sorted(kinds))
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in kinds or getattr(config, "use_sliding_window", None) is not False
    if window is not None and windowed and (hasattr(config, "layer_types") is False or "sliding_attention" in kinds):
        raise refuse("sliding_window", window)
    for name in ("attn_logit_softcapping", "attention_chunk_size", "alibi"):
        if getattr(config, name, None):
            raise refuse(name, getattr(config, name))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    if kind in _REFUSED_ROPE:
        raise refuse("rope_type", kind)
    if not rope and getattr(config, "rope_theta", None) is None:
        raise refuse("positions other than RoPE", getattr(config, "model_type", "?"))


class Probed(Protocol):
    """The part of an adapter that the probe at load uses."""

    shape: ModelShape

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def run(self, ids_S: Tensor, positions_S: Tensor, attention: Attention) -> None: ...

    def rotate(self, x_BHSD: Tensor, delta: int, layer: int) -> Tensor: ...


class _Probe:
    """Attention that keeps what it is given and lets no token see another."""

    needs_projections = False

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def __call__(
        self, layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, projections: object
    ) -> Tensor:
        self.seen.append((layer, q_BHSD, k_BKSD, v_BKSD))
        return v_BKSD.repeat_interleave(q_BHSD.shape[1] // v_BKSD.shape[1], dim=1).transpose(1, 2)


def check_model(adapter: Probed) -> None:
    """Run one token at two positions and refuse a model that does not do with attention what its kind promises.

    All layers must ask for attention once and in order, with heads as in the configuration, and rotated queries and
    keys must be those of the other position when they are rotated on. Raises UserError.
    """
    shape, probe = adapter.shape, _Probe()
    distance = min(_PROBED_DISTANCE, shape.max_positions - 1)
    # Not 0, which is often padding: a row of zeros, of which nothing can be learnt.
    ids_S = torch.full((2,), shape.vocab // 2, device=adapter.device)
    positions_S = torch.tensor([0, distance], device=adapter.device)
    with torch.inference_mode():
        try:
            adapter.run(ids_S, positions_S, probe)
            turned = [[adapter.rotate(x[:, :, :1], distance, at) for x in (q, k)] for at, q, k, _ in probe.seen]
        except PlainCall as error:
            raise _unfit(adapter, "its layers do not hand attention's keywords on") from error
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise _unfit(adapter, f"two tokens could not be run ({error})") from error
    if [layer for layer, *_ in probe.seen] != list(range(shape.layers)):
        raise _unfit(adapter, f"attention was asked for by layers {[layer for layer, *_ in probe.seen]}")
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    for (layer, *q_k_v), rotated in zip(probe.seen, turned, strict=True):
        for x, n in zip(q_k_v, heads, strict=True):
            if x.shape != (1, n, 2, shape.head_dim):
                raise _unfit(adapter, f"layer {layer} has heads of {tuple(x.shape)}, not (1, {n}, 2, {shape.head_dim})")
        for mine, x in zip(rotated, q_k_v, strict=False):
            theirs = x[:, :, 1:]
            # 8 roundings in low precision; in fp32 the angles themselves are known to some 1e-5.
            tolerance = max(1e-3, 8 * torch.finfo(x.dtype).eps) * float(theirs.abs().max())
            if not float((mine - theirs).abs().max()) <= tolerance:
                raise _unfit(adapter, f"in layer {layer} positions are not RoPE alone (a norm may come after it)")


def _unfit(adapter: Probed, why: str) -> UserError:
    return UserError(
        f"the model {adapter.name} cannot be prefilled over hosts: {why}",
        given=adapter.name,
        allowed="decoders whose layers take queries and keys from RoPE straight to causal attention",
        remedy="Choose a Llama-like decoder (Llama, Qwen, Mistral, Granite, Phi-3 and the like).",
    )
