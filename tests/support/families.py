"""Tiny random models of many families, every part of which matters, and whole runs of them as references.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apb.models.adapter import Adapter
from apb.models.classes import causal_lm
from apb.models.shape import model_shape
from tests.support.family_attention import ATTENTION
from tests.support.family_base import VOCAB, WINDOW, Family
from tests.support.family_states import STATES

__all__ = ["FAMILIES", "VOCAB", "WINDOW", "Family", "adapt_family", "build_family", "build_stirred", "whole_greedy"]
__all__ += ["whole_logits"]

FAMILIES: dict[str, Family] = STATES | ATTENTION
SLOWEST, FASTEST = 1e-3, 0.1  # decays of linear layers: slow ones, or states would be forgotten within a block


def build_family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model of a family in eval mode, eager in attention and experts; ``changes`` of its configuration.

    Equal seeds give equal weights, whatever the changes, as long as they leave the parameters' shapes.
    """
    return build_stirred(FAMILIES[name].config(**changes), dtype, seed)


def adapt_family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    """Return the same random model behind an adapter."""
    return Adapter(build_family(name, dtype, seed), model_shape(FAMILIES[name].config(), dtype))


def build_stirred(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a random model whose every part matters: norms, biases, sinks and decays are drawn, none is trivial."""
    config = copy.deepcopy(config)
    torch.manual_seed(seed)
    model = causal_lm().from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    stir(model, seed)
    return model.to(dtype).eval()


def stir(model: nn.Module, seed: int = 0) -> None:
    """Draw what transformers starts at a constant, or far from trained values."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            _stir(name, weight, rng)


def _stir(name: str, weight: Tensor, rng: torch.Generator) -> None:
    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(weight.shape).uniform_(low, high, generator=rng)

    def normal(size: float) -> Tensor:
        return size * torch.randn(weight.shape, generator=rng)

    last = name.rpartition(".")[2]
    if last == "A_log":
        weight.copy_(uniform(math.log(SLOWEST), math.log(FASTEST)))
    elif last in ("sinks", "attention_sink_bias"):
        weight.copy_(normal(1.0))
    elif last == "dt_bias":
        weight.copy_(normal(0.5))
    elif last == "e_score_correction_bias":
        weight.copy_(normal(0.05))
    elif last == "D" or (last == "weight" and weight.dim() == 1):  # norms, some of them centred at zero
        weight.copy_(uniform(0.5, 1.5) if weight.float().mean() > 0.5 else uniform(-0.5, 0.5))
    elif last.endswith("bias") and weight.is_floating_point():
        weight.copy_(normal(0.2))
    elif last == "layer_scalar":
        weight.copy_(uniform(0.5, 1.5))


def whole_logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the logits (S, V) after each token, by one run of transformers' own model over all of them."""
    with torch.inference_mode():
        logits_SV: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits_SV


def whole_greedy(model: nn.Module, ids: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the next ``count`` tokens, each the likeliest of a whole run over all before it.

    Runs with a cache are no reference: single steps of Nemotron-H go through a function that clamps nothing.
    """
    known = list(ids)
    for _ in range(count):
        known.append(int(whole_logits(model, known)[-1].argmax()))
    return tuple(known[len(ids) :])
