"""EAGLE-3 heads. Source: EAGLE-3 (arXiv 2503.01840); the format is the published one.

Shapes: B batch, S tokens, E hidden size, F feature width (3 E), K kv heads, D head dim, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apb.draft.base import DraftHead, HeadAttend, HeadAttention, HeadNorm, LayerShape, Mlp, Target, share
from burst.errors import UserError


class Eagle3Layer(nn.Module):
    """Embedding and feature are normed each by itself and read side by side; the feature is the residual."""

    def __init__(self, shape: LayerShape, target: Target) -> None:
        super().__init__()
        self.input_layernorm = HeadNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hidden_norm = HeadNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = HeadAttention(shape, 2 * shape.hidden_size, target.rotate)
        self.post_attention_layernorm = HeadNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def joined(self, embedded_BSE: Tensor, hidden_BSE: Tensor) -> Tensor:
        """Return what the projections read, (B, S, 2 E)."""
        return torch.cat([self.input_layernorm(embedded_BSE), self.hidden_norm(hidden_BSE)], dim=-1)

    def forward(self, embedded_BSE: Tensor, hidden_BSE: Tensor, positions_S: Tensor, attend: HeadAttend) -> Tensor:
        """Return the layer's output (B, S, E)."""
        x_BSE = hidden_BSE + self.self_attn(self.joined(embedded_BSE, hidden_BSE), positions_S, attend)
        out_BSE: Tensor = x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))
        return out_BSE


class Eagle3Head(DraftHead):
    """Reads the inputs of three of the target's layers; has its own norm, LM head and draft vocabulary.

    The file's ``d2t`` gives each draft id's distance to the target's id.
    """

    def __init__(
        self,
        shape: LayerShape,
        target: Target,
        ids_V: Tensor,
        *,
        window: int | None,
        sinks: int,
        taps: tuple[int, ...] | None = None,
    ) -> None:
        """``taps``: the layers that are read; None: EAGLE's own choice."""
        super().__init__(shape, target, window, sinks)
        layers = target.shape.layers
        if layers < 3:
            raise UserError(
                "this model has too few layers for an EAGLE-3 head",
                given=f"{layers} layers",
                allowed="3 or more: three of them are read",
                remedy="Use an EAGLE-2 head (apb train eagle), or decode=lookup.",
            )
        self.taps = taps or (2, layers // 2, layers - 3)
        self.fc = nn.Linear(3 * shape.hidden_size, shape.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(shape, target)
        self.norm = HeadNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, len(ids_V), bias=False)
        self.ids_V = self._own_V = ids_V.to(target.device)
        self._rows_VE: Tensor | None = None  # rows of the own LM head; None: all of them

    @classmethod
    def of(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target, window: int | None, sinks: int
    ) -> Eagle3Head:
        """Make the head that a configuration and its ``d2t`` describe; without one it drafts all ids."""
        shape = LayerShape.of(config, qkv_bias="midlayer.self_attn.q_proj.bias" in tensors)
        ids_V = torch.arange(len(tensors["lm_head.weight"]))
        if "d2t" in tensors:
            ids_V = tensors["d2t"].long() + torch.arange(len(tensors["d2t"]))
        taps = _taps(config, target.shape.layers)
        return cls(shape, target, ids_V, window=window, sinks=sinks, taps=taps)

    def fuse(self, features_BSF: Tensor) -> Tensor:
        fused_BSE: Tensor = self.fc(features_BSF)
        return fused_BSE

    def keys_values(self, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.midlayer.joined(self.embed(ids_BS), hidden_BSE)
        return self.midlayer.self_attn.keys_values(joined, positions_S)

    def step(self, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor, attend: HeadAttend) -> Tensor:
        out_BSE: Tensor = self.midlayer(self.embed(ids_BS), hidden_BSE, positions_S, attend)
        return out_BSE

    def logits(self, out_BSE: Tensor) -> Tensor:
        return F.linear(self.norm(out_BSE), self.lm_head.weight if self._rows_VE is None else self._rows_VE)

    def with_vocab(self, ids_V: Tensor) -> DraftHead:
        """Return this head drafting from ``ids_V``, for each of which it must have a row."""
        row_W = torch.full((self.target.shape.vocab,), -1, device=self.target.device)
        row_W[self._own_V] = torch.arange(len(self._own_V), device=self.target.device)
        rows_V = row_W[ids_V.to(self.target.device)]
        assert int(rows_V.min()) >= 0, "ids that this head cannot draft"
        twin = share(self)
        twin._rows_VE = self.lm_head.weight[rows_V]
        twin.ids_V = self._own_V[rows_V]
        return twin


def _taps(config: Mapping[str, Any], layers: int) -> tuple[int, ...] | None:
    """Return the layers that a configuration says are read, None where it does not; raises ValueError."""
    key = "eagle_aux_hidden_state_layer_ids"
    named = config.get(key) or (config.get("eagle_config") or {}).get(key)
    if named is None:
        return None
    fits = isinstance(named, list) and len(named) == 3 and all(type(i) is int and 0 <= i < layers for i in named)
    if not fits:
        raise ValueError(f"{key}={named}: three layers of 0 to {layers - 1} are read")
    return tuple(named)
