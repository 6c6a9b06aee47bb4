"""Draft heads: what a small model on top of a large one computes to guess the tokens that come next.

Shapes: B batch, S tokens, E hidden size of the target, F feature width, H query heads, K kv heads, D head dim,
V draft vocabulary, W whole vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apb.plan.shapes import ModelShape

# q (B, H, S, D), k and v (B, K, S, D) of new rows -> attention output (B, H, S, D)
HeadAttend = Callable[[Tensor, Tensor, Tensor], Tensor]
RotateTo = Callable[[Tensor, Tensor], Tensor]

WINDOW, SINKS = 512, 4  # tokens: what heads see whose file does not say; published ones were trained on 2,048


@dataclass(frozen=True, eq=False)
class Target:
    """Parts of the target model that a draft head shares; nothing is copied.

    ``rotate(x_BHSD, positions)`` turns queries or keys to their positions, (S,) or (B, S), as the target does, and
    ``rotation(parameters)`` makes a function that does so by other RoPE parameters (transformers' names); it raises
    KeyError, TypeError or ValueError for parameters that lack something.
    """

    name: str  # the model's class
    shape: ModelShape
    embedding_WE: Tensor
    head_WE: Tensor
    embedding_scale: float  # what embedded tokens are multiplied with
    logit_scale: float  # what the LM head's products, the bias added, are multiplied with
    rotate: RotateTo
    rotation: Callable[[Mapping[str, Any]], RotateTo]
    head_bias_W: Tensor | None = None
    soft_cap: float | None = None  # logits are then soft_cap * tanh(logits / soft_cap)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.embedding_WE.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding_WE.device


@dataclass(frozen=True)
class LayerShape:
    """The draft layer's own sizes, as its configuration names them."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], *, qkv_bias: bool = False) -> LayerShape:
        """Read a configuration; raises KeyError, TypeError or ValueError for one that lacks a size."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            qkv_bias=qkv_bias,
        )


class DraftHead(nn.Module, ABC):
    """One decoder layer that reads the target's features and the tokens after them.

    ``hidden_BSE[t]`` stands with ``ids_BS[t]``, the token *after* position t, at position t; what ``step`` returns for
    it stands in for the target's feature at t + 1, and ``logits`` of it for the token after that. Features of a drafted
    row are what ``step`` returned for its parent, unfused. ``ids_V`` are the target ids of the draft vocabulary's rows.
    ``taps``: empty for the target's final-norm output, else the layers whose input is taken, side by side.
    """

    taps: tuple[int, ...] = ()
    ids_V: Tensor

    def __init__(self, shape: LayerShape, target: Target, window: int | None, sinks: int) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = shape.num_key_value_heads, shape.head_dim
        self.target, self.window, self.sinks = target, window, sinks
        self.about: dict[str, str] = {}

    def fuse(self, features_BSF: Tensor) -> Tensor:
        """Return what ``step`` takes of the target's features, (B, S, E)."""
        return features_BSF

    @abstractmethod
    def keys_values(self, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated keys and values (B, K, S, D): a one-layer head's need no attention."""

    @abstractmethod
    def step(self, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor, attend: HeadAttend) -> Tensor:
        """Run the layer and return its output (B, S, E); ``attend`` does cache, window and tree mask."""

    @abstractmethod
    def logits(self, out_BSE: Tensor) -> Tensor:
        """Return the draft vocabulary's logits (B, S, V) of ``step``'s output."""

    @abstractmethod
    def with_vocab(self, ids_V: Tensor) -> DraftHead:
        """Return this head drafting from another subset of the target's ids; the layer's weights are shared."""

    def embed(self, ids_BS: Tensor) -> Tensor:
        """Return the target's embedding of tokens, (B, S, E)."""
        embedded_BSE = F.embedding(ids_BS, self.target.embedding_WE)
        return embedded_BSE if self.target.embedding_scale == 1.0 else embedded_BSE * self.target.embedding_scale


def finished(products: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """Return the logits of an LM head's products: scaled, then capped."""
    logits = products if scale == 1.0 else products * scale
    return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap


H = TypeVar("H", bound=DraftHead)


class SharedVocab(DraftHead):
    """A head that drafts with rows of the target's own LM head."""

    def __init__(self, shape: LayerShape, target: Target, window: int | None, sinks: int) -> None:
        super().__init__(shape, target, window, sinks)
        self.ids_V = torch.arange(target.shape.vocab, device=target.device)
        self._rows_VE, self._bias_V = target.head_WE, target.head_bias_W

    def logits(self, out_BSE: Tensor) -> Tensor:
        return finished(F.linear(out_BSE, self._rows_VE, self._bias_V), self.target.logit_scale, self.target.soft_cap)

    def with_vocab(self, ids_V: Tensor) -> DraftHead:
        twin = share(self)
        twin.ids_V = ids_V.to(self.target.device)
        twin._rows_VE = self.target.head_WE[twin.ids_V]
        twin._bias_V = None if self.target.head_bias_W is None else self.target.head_bias_W[twin.ids_V]
        return twin


def share(head: H) -> H:
    """Return a copy of a head whose parameters are the same tensors."""
    return copy.copy(head)


class HeadNorm(nn.Module):
    """RMSNorm as Llama's: computed in fp32, the weight multiplied in the input's type."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x_BSE: Tensor) -> Tensor:
        """Return the normed rows."""
        wide = x_BSE if x_BSE.dtype == torch.float64 else x_BSE.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        normed_BSE: Tensor = self.weight * scaled.to(x_BSE.dtype)
        return normed_BSE


class HeadAttention(nn.Module):
    """Projections round an attention that somebody else computes; ``inputs`` is the width that they read."""

    def __init__(self, shape: LayerShape, inputs: int, rotate: RotateTo) -> None:
        super().__init__()
        s = shape
        self._head_dim, self._rotate = s.head_dim, rotate
        self.q_proj = nn.Linear(inputs, s.num_attention_heads * s.head_dim, bias=s.qkv_bias)
        self.k_proj = nn.Linear(inputs, s.num_key_value_heads * s.head_dim, bias=s.qkv_bias)
        self.v_proj = nn.Linear(inputs, s.num_key_value_heads * s.head_dim, bias=s.qkv_bias)
        self.o_proj = nn.Linear(s.num_attention_heads * s.head_dim, s.hidden_size, bias=False)

    def keys_values(self, x_BSE: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated keys and values (B, K, S, D)."""
        return self._rotate(self._heads(self.k_proj(x_BSE)), positions_S), self._heads(self.v_proj(x_BSE))

    def forward(self, x_BSE: Tensor, positions_S: Tensor, attend: HeadAttend) -> Tensor:
        """Return the attention's output (B, S, E)."""
        q_BHSD = self._rotate(self._heads(self.q_proj(x_BSE)), positions_S)
        out_BHSD = attend(q_BHSD, *self.keys_values(x_BSE, positions_S))
        out_BSE: Tensor = self.o_proj(out_BHSD.transpose(1, 2).flatten(2))
        return out_BSE

    def _heads(self, x_BSE: Tensor) -> Tensor:
        heads_BHSD: Tensor = x_BSE.unflatten(-1, (-1, self._head_dim)).transpose(1, 2)
        return heads_BHSD


class Mlp(nn.Module):
    """Llama's gated network."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        """Return the network's output (B, S, E)."""
        out_BSE: Tensor = self.down_proj(F.silu(self.gate_proj(x_BSE)) * self.up_proj(x_BSE))
        return out_BSE
