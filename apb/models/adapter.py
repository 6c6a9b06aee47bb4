"""The only code that knows transformers' models: attention swapped in, states passed as keywords, nothing copied.

Shapes: B batch, S tokens, H query heads, K kv heads, D head dim (R rotary, P not), E projection width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from apb.attention.base import Attention, Prefill
from apb.draft.base import Target
from apb.draft.draft import Draft
from apb.layers.call import AttentionCall
from apb.layers.latent import Latent
from apb.layers.linear import Linear
from apb.layers.softmax import Softmax
from apb.models.checks import PlainCall, check_config, check_keywords, check_kind
from apb.models.chunked import Finished, InChunks, chunkable
from apb.models.classes import decoder
from apb.models.hooks import (
    Features,
    active_features,
    capturing,
    hook_features,
    hook_projections,
    placed,
    projecting,
    take_projections,
)
from apb.models.kinds import MIXER, Mixer, layer_kinds, mixers
from apb.models.latents import expansion, keep_latents
from apb.models.lengths import rotate_as_agreed
from apb.models.linear import hook_linear
from apb.models.probe import probe
from apb.models.rotation import Rotation
from apb.models.target import draft_target, own_end
from apb.models.temperature import by_temperature
from apb.plan.shapes import ModelShape
from burst.errors import UserError

IMPLEMENTATION = "apb"


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
    mixer: Mixer | None = getattr(module, MIXER, None)
    check_keywords(module, {"attention_mask": attention_mask, "dropout": dropout, **others})
    if apb_attention is None or mixer is None:
        raise PlainCall(
            "the model was called without its distributed attention",
            given="a plain forward call",
            allowed="calls through apb.models.adapter.Adapter",
            remedy="Use Engine.prefill and Engine.generate, or load the model with transformers.",
        )
    check_kind(others, mixer.kind)
    call = AttentionCall(
        mixer.number,
        by_temperature(module, query),
        key,
        value,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        others.get("s_aux"),
        take_projections() if mixer.kind.sharded else None,
        expansion(module) if isinstance(mixer.kind, Latent) else None,
    )
    return apb_attention(call).contiguous(), None  # most models would copy it themselves, some insist on it


AttentionInterface.register(IMPLEMENTATION, _attend)


class Adapter:
    """One loaded model: runs tokens at explicit positions through attention that we supply.

    Raises UserError when the architecture asks attention for something unsupported.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape) -> None:
        check_config(model.config)
        self.shape = shape
        self.draft: Draft | None = None  # virtual hosts share it, as they share the model
        self._model = model
        self._base: Any = decoder(model)
        rotate_as_agreed(self._base, shape.rope_border)
        model.set_attn_implementation(IMPLEMENTATION)
        self._mixers = self._number_mixers()
        for layer in self._layer_modules():
            inside = list(layer.modules())
            chunkable(layer, tuple(n for n, mixer in enumerate(self._mixers) if any(m is mixer for m in inside)))
        hook_features(self._base, self._layer_modules())
        self._rotation = Rotation(self._base, self._mixers)
        self.ends = probe(self, model, self._rotation)

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self._model).__name__

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The activations' type."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def fixed(self) -> bool:
        """True where layers launch the same kernels for the same number of tokens; experts are chosen by values."""
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
        to_the_end = features is not None and not features.taps
        assert isinstance(attention, Prefill)
        chunks = InChunks(attention, self.shape.mixers, chunk, to_the_end=to_the_end)
        with contextlib.suppress(Finished):
            self._forward(self._base, ids_S, positions_S, chunks)

    def capturing(self, taps: tuple[int, ...] | None, rows: Tensor | None = None) -> AbstractContextManager[Features]:
        """Keep the features of the tokens that are run meanwhile, once; ``taps`` None keeps nothing."""
        return capturing(taps, rows)

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
        """Return the logits (S, V) of what ``hidden`` returned, in the model's type.

        Raises UserError when the model does more with its LM head's products than scale and cap them.
        """
        if self.ends.logit_scale is None:
            raise own_end(self.name, "after its LM head")
        return self.ends.finish(self._model.get_output_embeddings()(hidden_SE))

    def draft_target(self) -> Target:
        """Return what draft heads share with this model; raises UserError as ``apb.models.target`` says."""
        rotary: nn.Module | None = getattr(self._base, "rotary_emb", None)
        return draft_target(self._model, self.shape, self.ends, self._rotation, rotary)

    def _logits(self, ids_S: Tensor, positions_S: Tensor, attention: Attention, keep: int) -> Tensor:
        if any(kind.reads is not None for kind in self.shape.mixers):
            # Models whose last layers read others' keys cut the tokens before these to those whose logits are wanted.
            logits_SV = self.head(self.hidden(ids_S, positions_S, attention)[-keep:])
        else:
            logits_SV = self._forward(self._model, ids_S, positions_S, attention, logits_to_keep=keep).logits[0]
        return logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()

    def rotate(self, x_BHSD: Tensor, delta: int | Tensor, mixer: int) -> Tensor:
        """Rotate a mixer's already rotated queries or keys on by ``delta`` positions (RoPE rotations add up).

        ``delta`` is one number for all tokens or (S,) whole numbers; negative ones rotate back. Raises UserError where
        positions change queries or keys in other ways too.
        """
        return self._rotation.on(x_BHSD, delta, mixer)

    def check_rotation(self) -> None:
        """Raise UserError where ``rotate`` would in a sharded layer."""
        for mixer, kind in enumerate(self.shape.mixers):
            if kind.sharded:
                self._rotation.check(mixer)

    def _forward(
        self, module: nn.Module, ids_S: Tensor, positions_S: Tensor, attention: Attention, **options: Any
    ) -> Any:
        with projecting(attention.needs_projections), placed(positions_S):
            return module(
                input_ids=ids_S[None],
                position_ids=positions_S[None],
                use_cache=False,
                apb_attention=attention,
                **options,
            )

    def _number_mixers(self) -> list[nn.Module]:
        """Find the modules that mix tokens, and leave each its number and kind."""
        found = mixers(self._base)
        kinds = layer_kinds(self._base, self._model.config)
        if kinds != self.shape.mixers or not found:
            raise UserError(
                "the model's layers are not those that its configuration promises",
                given=f"{self.name}: {len(found)} that mix tokens in a known way",
                allowed=f"the {len(self.shape.mixers)} of its configuration, one or more",
                remedy="Choose a model whose layers are listed in docs/models.md.",
            )
        for number, (module, kind) in enumerate(zip(found, kinds, strict=True)):
            setattr(module, MIXER, Mixer(number, kind))
            if isinstance(kind, Latent):
                keep_latents(module)
                continue
            if isinstance(kind, Linear):
                hook_linear(module, number)
                continue
            assert isinstance(kind, Softmax)
            if kind.sharded:  # rows of the others are never chosen
                widths = [kind.q_heads * kind.qk_dim, kind.kv_heads * kind.qk_dim, kind.kv_heads * kind.v_dim]
                hook_projections(module, widths)
        return found

    def _layer_modules(self) -> list[nn.Module]:
        """The decoder layers: the entries of the list that holds all mixers."""
        inside = {id(m) for m in self._mixers}
        lists = [m for m in self._base.modules() if isinstance(m, nn.ModuleList)]
        for each in lists:
            if inside <= {id(m) for layer in each for m in layer.modules()}:
                return list(each)
        raise UserError(
            "the model's layers are not one after another",
            given=f"{self.name}: mixers in several lists of layers",
            allowed="decoders with one list of layers",
            remedy="Choose a model of docs/models.md.",
        )
