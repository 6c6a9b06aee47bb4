"""Fitting one layer's head to labelled tokens: a linear map in closed form, or a small network that starts from it.

Shapes: N tokens, E width of a head's input, W hidden width, K kv heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apb.compress.heads import Head
from burst.errors import UserError, choose, in_range

Method = Literal["mlp", "ridge"]
_FAR = 3.0  # standard deviations: ridge's squares would spend themselves on the few tokens beyond


@dataclass(frozen=True)
class FitRecipe:
    """Settings of fitting one layer's head.

    Ridge regression predicts the margins; ``penalty`` is its share of the mean squared input. The network starts as
    ridge's map and minimises binary cross-entropy against ``sigmoid(margin / softness)``: a token is to be found as
    far as it stands above the border of its prompt's top 10%. AdamW with linear warm-up and cosine decay.
    Source: Locret (arXiv 2410.01805) section 3.2, with another loss and start, and without the penalty on neighbouring
    scores, whose tokens are not neighbours here.
    """

    method: Method = "mlp"
    hidden: int = 128
    epochs: int = 10
    batch: int = 256  # tokens
    lr: float = 1e-3
    weight_decay: float = 0.5
    softness: float = 1.0  # standard deviations of importance
    penalty: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        choose("method", self.method, ("mlp", "ridge"))
        for key in ("hidden", "epochs", "batch", "lr"):
            value = getattr(self, key)
            in_range(key, value, value > 0 and math.isfinite(value), "more than 0")


def fit(recipe: FitRecipe, layer: int, x_NE: Tensor, margin_NK: Tensor, on_step: Callable[[int, int], None]) -> Head:
    """Return the head of ``layer``, fp32: the same for the same recipe and tokens; ``on_step(done, total)``.

    Raises UserError when the hidden width cannot hold the linear map that the network starts as.
    """
    mean_E = x_NE.float().mean(dim=0)
    deviation_E = x_NE.float().std(dim=0).clamp_min(1e-4)
    z_NE = (x_NE.float() - mean_E) / deviation_E
    on_step(0, 1)
    head = _ridge(recipe, z_NE, margin_NK)
    if recipe.method == "mlp":
        head = _mlp(recipe, layer, z_NE, margin_NK, head.fc1_WE, on_step)
    return head.absorbing(mean_E, deviation_E)


def _ridge(recipe: FitRecipe, z_NE: Tensor, margin_NK: Tensor) -> Head:
    gram_EE = z_NE.T @ z_NE
    gram_EE.diagonal().add_(recipe.penalty * len(z_NE))
    target_NK = margin_NK.clamp(min=-_FAR, max=_FAR)
    weight_EK = torch.linalg.solve(gram_EE, z_NE.T @ (target_NK - target_NK.mean(dim=0)))
    return Head(weight_EK.T.contiguous())


def _mlp(
    recipe: FitRecipe,
    layer: int,
    z_NE: Tensor,
    margin_NK: Tensor,
    linear_KE: Tensor,
    on_step: Callable[[int, int], None],
) -> Head:
    rng = torch.Generator().manual_seed(recipe.seed * 100_003 + layer)
    fc1_WE, fc2_KW = _start(recipe, linear_KE, rng)
    fc1, fc2 = nn.Parameter(fc1_WE), nn.Parameter(fc2_KW)
    bias = nn.Parameter(z_NE.new_zeros(recipe.hidden))
    # Scores need no offset to be compared with each other, but the loss compares them with zero.
    offset = nn.Parameter(margin_NK.clamp(min=-_FAR, max=_FAR).mean(dim=0) / recipe.softness)
    optimizer = torch.optim.AdamW(
        [{"params": [fc1, fc2], "weight_decay": recipe.weight_decay}, {"params": [bias, offset], "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.95),
    )
    steps = recipe.epochs * math.ceil(len(z_NE) / recipe.batch)
    warmup = max(1, steps // 20)
    target_NK = torch.sigmoid(margin_NK / recipe.softness)
    step = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(z_NE), generator=rng).to(z_NE.device)
        for index in order.split(recipe.batch):
            rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate
            scores_NK = F.silu(z_NE[index] @ fc1.T + bias) @ fc2.T + offset
            loss = F.binary_cross_entropy_with_logits(scores_NK, target_NK[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            on_step(step, steps)
    return Head(fc1.detach(), bias.detach(), fc2.detach())


def _start(recipe: FitRecipe, linear_KE: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return first weights (W, E) and (K, W) that compute ``linear / softness``: silu(a) - silu(-a) = a."""
    kv_heads, width = linear_KE.shape
    if recipe.hidden < 2 * kv_heads:
        raise UserError(
            "the hidden width is too small to start from",
            given=f"hidden={recipe.hidden}",
            allowed=f"{2 * kv_heads} or more for {kv_heads} kv heads",
            remedy="Raise hidden, or set method=ridge.",
        )
    fc1_WE = (torch.randn(recipe.hidden, width, generator=rng) / math.sqrt(width)).to(linear_KE)
    fc2_KW = linear_KE.new_zeros(kv_heads, recipe.hidden)
    for k in range(kv_heads):
        fc1_WE[2 * k], fc1_WE[2 * k + 1] = linear_KE[k] / recipe.softness, -linear_KE[k] / recipe.softness
        fc2_KW[k, 2 * k], fc2_KW[k, 2 * k + 1] = 1.0, -1.0
    return fc1_WE, fc2_KW
