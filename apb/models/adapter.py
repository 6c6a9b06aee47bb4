"""The only code that knows transformers' models: attention swapped in, states passed as keywords, nothing copied.

Shapes: B batch, S tokens, H query heads, K kv heads, D head dim (R rotary, P not), E projection width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from apb.attention.base import Attention
from apb.draft.base import RotateTo, Target
from apb.draft.draft import Draft
from apb.kv.layer import Projections
from apb.models.checks import PlainCall, check_config, check_keywords, check_model
from apb.models.chunked import Finished, InChunks, chunkable
from apb.plan.shapes import ModelShape
from burst.errors import UserError

IMPLEMENTATION = "apb"

# Projections of the layer under way, and features; virtual ranks are threads, so each has its own.
_captured = threading.local()
_LASTING = ("rope_theta", "partial_rotary_factor")  # the model's own where a draft head names no other
FINAL = -1  # the final norm's output among the features


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    apb_attention: Attention | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention hook: check that nothing is asked that we do not do, then hand over."""
    check_keywords(module, {"attention_mask": attention_mask, "dropout": dropout, **others})
    if apb_attention is None:
        raise PlainCall(
            "the model was called without its distributed attention",
            given="a plain forward call",
            allowed="calls through apb.models.adapter.Adapter",
            remedy="Use Engine.prefill and Engine.generate, or load the model with transformers.",
        )
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out_BSHD = apb_attention(layer, query, key, value, scale, _take_projections())
    return out_BSHD.contiguous(), None  # most models would copy it themselves in their next line, some insist on it


AttentionInterface.register(IMPLEMENTATION, _attend)


def _take_projections() -> Projections | None:
    slot: dict[str, Tensor] | None = getattr(_captured, "slot", None)
    if slot is None:
        return None
    out = Projections(slot.pop("q"), slot.pop("k"), slot.pop("v"))
    assert not slot, sorted(slot)
    return out


@dataclass
class Features:
    """What a draft head reads of tokens that run through the model.

    ``taps``: the layers whose input it reads; empty: the final norm's output. ``rows``: of these tokens only."""

    taps: tuple[int, ...]
    rows: Tensor | None = None
    parts: dict[int, Tensor] = field(default_factory=dict)

    @property
    def value_SF(self) -> Tensor:
        """The features (S, F), taps side by side."""
        return torch.cat([self.parts[tap] for tap in self.taps or (FINAL,)], dim=-1)

    def keep(self, tap: int, hidden_BSE: Tensor) -> None:
        """Copy what passes a tap: layers may go on to write over it."""
        if tap in (self.taps or (FINAL,)):
            rows_SE = hidden_BSE[0]
            self.parts[tap] = rows_SE.clone() if self.rows is None else rows_SE.index_select(0, self.rows)


def active_features() -> Features | None:
    """Return what this thread is keeping features in."""
    features: Features | None = getattr(_captured, "features", None)
    return features


class Adapter:
    """One loaded model: runs tokens at explicit positions through attention that we supply.

    Raises UserError when the architecture asks attention for something that is not honoured.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_config(model.config)
        self.shape = shape
        self.draft: Draft | None = None  # virtual hosts share it, as they share the model
        self._model = model
        self._base = model.base_model
        model.set_attn_implementation(IMPLEMENTATION)
        self._attentions = self._attention_modules()
        for module in self._attentions:
            self._hook_projections(module)
        for number, layer in enumerate(self._layer_modules()):
            chunkable(layer)
            layer.register_forward_pre_hook(_feature_hook(number), with_kwargs=True)
        self._base.register_forward_hook(_keep_final)
        check_model(self)

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self._model).__name__

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The activations' type."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def fixed(self) -> bool:
        """Whether what layers launch depends on nothing but the number of tokens; experts are chosen by values."""
        config = self._model.config.get_text_config()
        return not any(getattr(config, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))

    def run(self, ids_S: Tensor, positions_S: Tensor, attention: Attention, chunk: int | None = None) -> None:
        """Run tokens through all layers for the keys and values they leave with ``attention``.

        ``chunk``: tokens that go through a layer at once; attention is still called once a layer, with all of them.
        """
        if chunk is None or chunk >= len(ids_S):
            self._forward(self._base, ids_S, positions_S, attention)
            return
        features = active_features()
        last = None if features is not None and not features.taps else self.shape.layers - 1
        chunks = InChunks(attention, attention.needs_projections, last, chunk)
        with contextlib.suppress(Finished):
            self._forward(self._base, ids_S, positions_S, chunks)

    @contextlib.contextmanager
    def capturing(self, taps: tuple[int, ...] | None, rows: Tensor | None = None) -> Iterator[Features]:
        """Keep the features of the tokens that are run meanwhile, once; ``taps`` None keeps nothing."""
        features, before = Features(taps or (), rows), active_features()
        _captured.features = features if taps is not None else None
        try:
            yield features
        finally:
            _captured.features = before

    def logits(self, ids_S: Tensor, positions_S: Tensor, attention: Attention) -> Tensor:
        """Run tokens and return the last one's next-token logits (V,), fp32 (fp64 for fp64 models)."""
        return self._logits(ids_S, positions_S, attention, 1)[-1]

    def all_logits(self, ids_S: Tensor, positions_S: Tensor, attention: Attention) -> Tensor:
        """Run tokens and return the logits (S, V) after each of them, fp32 (fp64 for fp64 models)."""
        return self._logits(ids_S, positions_S, attention, len(ids_S))

    def hidden(self, ids_S: Tensor, positions_S: Tensor, attention: Attention) -> Tensor:
        """Run tokens and return what the LM head reads of each of them, (S, hidden), in the model's type."""
        out = self._forward(self._base, ids_S, positions_S, attention)
        hidden_SE: Tensor = out.last_hidden_state[0]
        return hidden_SE

    def head(self, hidden_SE: Tensor) -> Tensor:
        """Return the logits (S, V) of what ``hidden`` returned, in the model's type."""
        logits_SV: Tensor = self._model.get_output_embeddings()(hidden_SE)
        return logits_SV if self.logit_scale == 1.0 else logits_SV * self.logit_scale

    def draft_target(self) -> Target:
        """Return what draft heads share with this model."""

        def turning(rotary: nn.Module) -> RotateTo:
            def rotate(x_BHSD: Tensor, positions: Tensor) -> Tensor:
                cos, sin = rotary(x_BHSD, positions if positions.dim() == 2 else positions[None])
                return self._rotated(x_BHSD, cos, sin, 0)

            return rotate

        def rotation(parameters: Mapping[str, Any]) -> RotateTo:
            config = copy.deepcopy(self._model.config)
            kept = {key: config.rope_parameters[key] for key in _LASTING if key in config.rope_parameters}
            config.rope_parameters = {**kept, **parameters}
            return turning(type(self._base.rotary_emb)(config=config).to(self.device))

        return Target(
            name=self.name,
            shape=self.shape,
            embedding_WE=self._model.get_input_embeddings().weight.detach(),
            head_WE=self._model.get_output_embeddings().weight.detach(),
            embedding_scale=float(getattr(self._model.config, "embedding_multiplier", 1.0)),
            logit_scale=self.logit_scale,
            rotate=turning(self._base.rotary_emb),
            rotation=rotation,
        )

    @property
    def logit_scale(self) -> float:
        """What the LM head's products are multiplied with: MiniCPM and Granite divide them."""
        return 1.0 / float(getattr(self._model.config, "logits_scaling", 1.0))

    def _logits(self, ids_S: Tensor, positions_S: Tensor, attention: Attention, keep: int) -> Tensor:
        out = self._forward(self._model, ids_S, positions_S, attention, logits_to_keep=keep)
        logits_SV: Tensor = out.logits[0]
        return logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()

    def rotate(self, x_BHSD: Tensor, delta: int | Tensor, layer: int) -> Tensor:
        """RotateTo a layer's already rotated queries or keys on by ``delta`` positions (RoPE rotations add up).

        ``delta`` is one number for all tokens or (S,) whole numbers; negative ones rotate back.
        """
        attention = self._attentions[layer]
        if not getattr(attention, "use_rope", True):  # SmolLM3 leaves positions out of some layers
            return x_BHSD
        rotary = self._base.rotary_emb
        # A number is filled in on the device: copying it there would wait for the device.
        turn = delta if isinstance(delta, Tensor) else torch.full((1,), delta, device=x_BHSD.device)
        cos, sin = rotary(x_BHSD, turn.reshape(1, -1))
        # cos and sin carry the scaling of YaRN and its like; it is in x already.
        scaling = getattr(rotary, "attention_scaling", 1.0)
        return self._rotated(x_BHSD, cos / scaling, sin / scaling, layer)

    def _rotated(self, x_BHSD: Tensor, cos: Tensor, sin: Tensor, layer: int) -> Tensor:
        apply = sys.modules[type(self._attentions[layer]).__module__].apply_rotary_pos_emb
        turning = cos.shape[-1]  # the dimensions beyond are never rotated
        x_BHSR, rest_BHSP = x_BHSD[..., :turning], x_BHSD[..., turning:]
        rotated: Tensor = apply(x_BHSR, x_BHSR, cos, sin)[0]
        return torch.cat([rotated, rest_BHSP], dim=-1) if rest_BHSP.shape[-1] else rotated

    def _forward(
        self, module: nn.Module, ids_S: Tensor, positions_S: Tensor, attention: Attention, **options: Any
    ) -> Any:
        if attention.needs_projections:
            _captured.slot = {}
        try:
            return module(
                input_ids=ids_S[None],
                position_ids=positions_S[None],
                use_cache=False,
                apb_attention=attention,
                **options,
            )
        finally:
            _captured.slot = None

    def _attention_modules(self) -> list[nn.Module]:
        found = [m for m in self._base.modules() if hasattr(m, "layer_idx") and _has_projections(m)]
        if len(found) != self.shape.layers:
            raise UserError(
                "the model's attention layers could not be found",
                given=f"{self.name}: {len(found)} of {self.shape.layers} layers",
                allowed="decoders whose every layer has one attention module with q, k and v projections",
                remedy="Choose a Llama-like decoder (Llama, Qwen, Mistral, Granite, Phi-3 and the like).",
            )
        return found

    def _layer_modules(self) -> list[nn.Module]:
        """The decoder layers: the modules that hold one attention module each."""
        found = {id(m) for m in self._attentions}
        return [m for m in self._base.modules() if any(id(child) in found for child in m.children())]

    def _hook_projections(self, module: nn.Module) -> None:
        """Let a layer's raw projections be seen; a hook costs nothing while nobody asks."""

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                slot = getattr(_captured, "slot", None)
                if slot is not None:
                    slot.update(_split(name, output))

            return hook

        s = self.shape
        widths = [s.q_heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]

        def _split(name: str, output: Tensor) -> dict[str, Tensor]:
            if name != "qkv":
                return {name: output}
            return dict(zip("qkv", output.split(widths, dim=-1), strict=True))

        for name in ("q", "k", "v", "qkv"):
            projection = getattr(module, f"{name}_proj", None)
            if projection is not None:
                projection.register_forward_hook(keep(name))


def _feature_hook(layer: int) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
        features = active_features()
        if features is not None:
            features.keep(layer, inputs[0] if inputs else given["hidden_states"])

    return hook


def _keep_final(_module: nn.Module, _inputs: Any, output: Any) -> None:
    features = active_features()
    if features is not None:
        features.keep(FINAL, output.last_hidden_state)


def _has_projections(module: nn.Module) -> bool:
    """Whether q, k and v are plain projections; DeepSeek's compressed keys, for one, are not."""
    return hasattr(module, "qkv_proj") or all(hasattr(module, f"{name}_proj") for name in "qkv")
