"""Fitting one layer's head to labelled tokens: a small MLP by gradient descent, or a linear map in closed form.

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

from apb.heads import Head
from burst.errors import UserError, choose

Method = Literal["mlp", "ridge"]


@dataclass(frozen=True)
class Recipe:
    """How a layer's head is fitted.

    The MLP minimises binary cross-entropy against ``sigmoid(margin / softness)``: a token counts as found when it
    belongs to the top 10% of its prompt, and half as much at the border. AdamW with linear warm-up and cosine decay.
    ``penalty`` is ridge's, as a share of the mean squared input. Source: Locret (arXiv 2410.01805) section 3.2 with
    another loss and without the penalty on neighbouring scores, whose tokens are not neighbours here.
    """

    method: Method = "mlp"
    hidden: int = 128
    epochs: int = 10
    batch: int = 512  # tokens
    lr: float = 1e-3
    weight_decay: float = 0.05
    softness: float = 1.0  # standard deviations of importance
    penalty: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        choose("method", self.method, ("mlp", "ridge"))
        for key, fine in (("hidden", self.hidden >= 1), ("epochs", self.epochs >= 1), ("batch", self.batch >= 1)):
            if not fine:
                raise UserError(
                    f"{key} is out of range",
                    given=f"{key}={getattr(self, key)}",
                    allowed="1 or more",
                    remedy=f"Change {key}.",
                )


def fit(recipe: Recipe, layer: int, x_NE: Tensor, margin_NK: Tensor, on_step: Callable[[int, int], None]) -> Head:
    """Return the head of ``layer``, fp32: the same for the same recipe and tokens; ``on_step(done, total)``."""
    mean_E = x_NE.float().mean(dim=0)
    deviation_E = x_NE.float().std(dim=0).clamp_min(1e-4)
    if recipe.method == "ridge":
        on_step(0, 1)
        head = _ridge(recipe, (x_NE.float() - mean_E) / deviation_E, margin_NK)
    else:
        head = _mlp(recipe, layer, x_NE, mean_E, deviation_E, margin_NK, on_step)
    return head.absorbing(mean_E, deviation_E)


def _ridge(recipe: Recipe, z_NE: Tensor, margin_NK: Tensor) -> Head:
    gram_EE = z_NE.T @ z_NE
    gram_EE.diagonal().add_(recipe.penalty * len(z_NE))
    target_NK = margin_NK.clamp(min=-3, max=3)
    weight_EK = torch.linalg.solve(gram_EE, z_NE.T @ (target_NK - target_NK.mean(dim=0)))
    return Head(weight_EK.T.contiguous())


def _mlp(
    recipe: Recipe,
    layer: int,
    x_NE: Tensor,
    mean_E: Tensor,
    deviation_E: Tensor,
    margin_NK: Tensor,
    on_step: Callable[[int, int], None],
) -> Head:
    device, (tokens, width), kv_heads = x_NE.device, x_NE.shape, margin_NK.shape[1]
    rng = torch.Generator().manual_seed(recipe.seed * 100_003 + layer)
    fc1 = nn.Parameter((torch.randn(recipe.hidden, width, generator=rng) / math.sqrt(width)).to(device))
    bias = nn.Parameter(torch.zeros(recipe.hidden, device=device))
    fc2 = nn.Parameter((torch.randn(kv_heads, recipe.hidden, generator=rng) / math.sqrt(recipe.hidden)).to(device))
    # Scores need no offset to be compared with each other, but the loss compares them with zero.
    offset = nn.Parameter(torch.full((kv_heads,), -2.0, device=device))
    optimizer = torch.optim.AdamW(
        [{"params": [fc1, fc2], "weight_decay": recipe.weight_decay}, {"params": [bias, offset], "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.95),
    )
    per_epoch = math.ceil(tokens / recipe.batch)
    steps = recipe.epochs * per_epoch
    warmup = max(1, steps // 20)
    target_NK = torch.sigmoid(margin_NK / recipe.softness)
    step = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(tokens, generator=rng).to(device)
        for index in order.split(recipe.batch):
            rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate
            z_NE = (x_NE[index].float() - mean_E) / deviation_E
            scores_NK = F.silu(z_NE @ fc1.T + bias) @ fc2.T + offset
            loss = F.binary_cross_entropy_with_logits(scores_NK, target_NK[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            on_step(step, steps)
    return Head(fc1.detach(), bias.detach(), fc2.detach())
