"""Training-free, question-aware selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apb.compress.base import COMPRESSORS, Candidates, Compressor
from apb.compress.pool import check_window, max_pool
from burst.registry import option

_AT_ONCE = 2**24  # probabilities held at a time: 64 MB in fp32, however long the question is


@COMPRESSORS.register("query", "the tokens that the question attends to most")
@dataclass(frozen=True)
class Query(Compressor):
    """Scores a token by the attention that the embedded question pays to it.

    The softmax over the block, per question token and query head, makes all of them weigh alike; then the mean over
    the question's tokens and the query heads of a group. Parameters: ``window``: tokens that the max-pool spans.

    Source: Spava (arXiv 2601.21444): mean of products and a max-pool of 5. The softmax is ours.
    """

    needs_question: ClassVar[bool] = True

    window: int = option(5, "neighbouring tokens that a score spreads over, by a max-pool")

    def __post_init__(self) -> None:
        check_window(self.window)

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32."""
        q_BHQD, k_BKSD = block.question_q_BHQD, block.k_BKSD
        assert q_BHQD is not None, "the plan gives every selecting host the question's queries"
        n_kv = k_BKSD.shape[1]
        group = q_BHQD.shape[1] // n_kv
        rows = max(1, _AT_ONCE // (group * k_BKSD.shape[2]))
        per_head = []
        for j in range(n_kv):
            k_B1DS = k_BKSD[:, j : j + 1].transpose(-1, -2)
            parts_BS = []
            for q_BGQD in q_BHQD[:, j * group : (j + 1) * group].split(rows, dim=2):
                weights_BGQS = ((q_BGQD @ k_B1DS).float() * block.scale).softmax(dim=-1)
                parts_BS.append(weights_BGQS.sum(dim=(1, 2)))
            per_head.append(torch.stack(parts_BS).sum(dim=0) / (group * q_BHQD.shape[2]))
        return max_pool(torch.stack(per_head, dim=1), self.window)
