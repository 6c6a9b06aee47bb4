"""Spreading a token's score over its neighbours.

Shapes: B batch, K kv heads, S block tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from burst.errors import UserError


def check_window(window: int, option: str = "window") -> None:
    """Raise UserError unless a pool over ``window`` tokens has a middle."""
    if window < 1 or window % 2 == 0:
        raise UserError(
            "the window of a pool must have a middle",
            given=f"compress.{option}={window}",
            allowed="1, 3, 5, ...",
            remedy=f"Choose an odd compress.{option}; 1 pools nothing.",
        )


def max_pool(scores_BKS: Tensor, window: int) -> Tensor:
    """Return each token's highest score among its ``window`` neighbours, itself in the middle."""
    return F.max_pool1d(scores_BKS, window, stride=1, padding=window // 2) if window > 1 else scores_BKS


def mean_pool(scores_BKS: Tensor, window: int) -> Tensor:
    """Return the mean score of each token's ``window`` neighbours, fewer at the block's ends."""
    return F.avg_pool1d(scores_BKS, window, stride=1, padding=window // 2, count_include_pad=False)
