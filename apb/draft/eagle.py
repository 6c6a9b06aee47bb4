"""EAGLE-1/2 heads. Source: EAGLE (arXiv 2401.15077) and EAGLE-2 (arXiv 2406.16858); the format is the published one.

Shapes: B batch, S tokens, E hidden size, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from apb.draft.base import HeadAttend, HeadAttention, HeadNorm, LayerShape, Mlp, SharedVocab, Target

# Sizes of a fresh head's projections, where not 1.
_STARTS = {"q_proj": 0.2, "k_proj": 0.2, "o_proj": 0.1, "down_proj": 0.1}


class EagleLayer(nn.Module):
    """The decoder layer; the first of an EAGLE head has no input norm."""

    def __init__(self, shape: LayerShape, target: Target) -> None:
        super().__init__()
        self.self_attn = HeadAttention(shape, shape.hidden_size, target.rotate)
        self.post_attention_layernorm = HeadNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x_BSE: Tensor, positions_S: Tensor, attend: HeadAttend) -> Tensor:
        """Return the layer's output (B, S, E)."""
        x_BSE = x_BSE + self.self_attn(x_BSE, positions_S, attend)
        out_BSE: Tensor = x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))
        return out_BSE


class EagleHead(SharedVocab):
    """``layer(fc([embedding, feature]))``, drafting with the target's LM head; nothing is normed before it."""

    def __init__(self, shape: LayerShape, target: Target, *, fc_bias: bool, window: int | None, sinks: int) -> None:
        super().__init__(shape, target, window, sinks)
        self._shape = shape
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([EagleLayer(shape, target)])

    @classmethod
    def of(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target, window: int | None, sinks: int
    ) -> EagleHead:
        """Make the head that a configuration describes; without the key ``bias`` its ``fc`` has one."""
        shape = LayerShape.of(config, qkv_bias="layers.0.self_attn.q_proj.bias" in tensors)
        return cls(shape, target, fc_bias=bool(config.get("bias", True)), window=window, sinks=sinks)

    @classmethod
    def fresh(cls, target: Target, *, window: int | None, sinks: int, seed: int = 0) -> EagleHead:
        """Return a head of random weights, fp32, whose layer is like one of the target's: where training starts."""
        s = target.shape
        shape = LayerShape(
            s.hidden, s.intermediate, s.heads.q_heads, s.heads.kv_heads, s.heads.qk_dim, rms_norm_eps=1e-5
        )
        head = cls(shape, target, fc_bias=False, window=window, sinks=sinks)
        rng = torch.Generator().manual_seed(seed)
        for name, weight in head.named_parameters():
            if weight.dim() > 1:
                # Nothing is normed before attention: queries and keys of full size would saturate its softmax for good.
                size = next((s for part, s in _STARTS.items() if part in name), 1.0)
                nn.init.normal_(weight, std=size * weight.shape[1] ** -0.5, generator=rng)
        return head.to(target.device)

    def absorbing(self, scale: float, target: Target) -> EagleHead:
        """Return the head that does with ``target``'s embedding what this one does with ``scale`` times it."""
        bias = self.fc.bias is not None
        head = EagleHead(self._shape, target, fc_bias=bias, window=self.window, sinks=self.sinks)
        head.load_state_dict(self.state_dict())
        with torch.no_grad():
            head.fc.weight[:, : self._shape.hidden_size] *= scale
        return head.to(target.device).requires_grad_(False)

    @property
    def config(self) -> dict[str, Any]:
        """Published configuration keys of this head."""
        s = self._shape
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "vocab_size": self.target.shape.vocab,
            "bias": self.fc.bias is not None,
            **{key: value for key, value in asdict(s).items() if key != "qkv_bias"},
        }

    def keys_values(self, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[0]
        found: tuple[Tensor, Tensor] = layer.self_attn.keys_values(self._joined(hidden_BSE, ids_BS), positions_S)
        return found

    def step(self, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor, attend: HeadAttend) -> Tensor:
        out_BSE: Tensor = self.layers[0](self._joined(hidden_BSE, ids_BS), positions_S, attend)
        return out_BSE

    def _joined(self, hidden_BSE: Tensor, ids_BS: Tensor) -> Tensor:
        joined_BSE: Tensor = self.fc(torch.cat([self.embed(ids_BS), hidden_BSE], dim=-1))
        return joined_BSE
