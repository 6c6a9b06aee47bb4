"""MiniCPM4's EAGLE heads: both inputs normed, the layer's input norm kept, residuals scaled.

Source: the published checkpoints of MiniCPM4 (arXiv 2506.07900) and CPM.cu's reading of them.
Shapes: B batch, S tokens, E hidden size, K kv heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apb.draft.base import HeadAttend, HeadNorm, LayerShape, SharedVocab, Target
from apb.draft.eagle import EagleLayer


class MiniCpmLayer(EagleLayer):
    """A whole decoder layer of MiniCPM: what attention and network add is scaled down."""

    def __init__(self, shape: LayerShape, target: Target, residual_scale: float) -> None:
        super().__init__(shape, target)
        self.input_layernorm = HeadNorm(shape.hidden_size, shape.rms_norm_eps)
        self._scale = residual_scale

    def forward(self, x_BSE: Tensor, positions_S: Tensor, attend: HeadAttend) -> Tensor:
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), positions_S, attend) * self._scale
        out_BSE: Tensor = x_BSE + self.mlp(self.post_attention_layernorm(x_BSE)) * self._scale
        return out_BSE


class MiniCpmHead(SharedVocab):
    """``layer(fc([norm1(embedding), norm2(feature)]))``; residuals are scaled by scale_depth / sqrt(L + 1).

    L is the target's depth: the head counts as one layer more.
    """

    def __init__(
        self,
        shape: LayerShape,
        target: Target,
        *,
        fc_bias: bool,
        scale_depth: float,
        window: int | None,
        sinks: int,
    ) -> None:
        super().__init__(shape, target, window, sinks)
        self.input_norm1 = HeadNorm(shape.hidden_size, shape.rms_norm_eps)
        self.input_norm2 = HeadNorm(shape.hidden_size, shape.rms_norm_eps)
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=fc_bias)
        scale = scale_depth / math.sqrt(target.shape.layers + 1)
        self.layers = nn.ModuleList([MiniCpmLayer(shape, target, scale)])

    @classmethod
    def of(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target, window: int | None, sinks: int
    ) -> MiniCpmHead:
        """Make the head that a configuration describes."""
        return cls(
            LayerShape.of(config, qkv_bias="layers.0.self_attn.q_proj.bias" in tensors),
            target,
            fc_bias="fc.bias" in tensors,
            scale_depth=float(config["scale_depth"]),
            window=window,
            sinks=sinks,
        )

    def keys_values(self, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[0]
        x_BSE = layer.input_layernorm(self._joined(hidden_BSE, ids_BS))
        found: tuple[Tensor, Tensor] = layer.self_attn.keys_values(x_BSE, positions_S)
        return found

    def step(self, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor, attend: HeadAttend) -> Tensor:
        out_BSE: Tensor = self.layers[0](self._joined(hidden_BSE, ids_BS), positions_S, attend)
        return out_BSE

    def _joined(self, hidden_BSE: Tensor, ids_BS: Tensor) -> Tensor:
        normed = [self.input_norm1(self.embed(ids_BS)), self.input_norm2(hidden_BSE)]
        joined_BSE: Tensor = self.fc(torch.cat(normed, dim=-1))
        return joined_BSE
