"""Training-free, question-aware selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.compress.base import Candidates, Compressor
from burst.errors import UserError

_AT_ONCE = 2**24  # probabilities held at a time: 64 MB in fp32, however long the question is


@dataclass(frozen=True)
class Query(Compressor):
    """Scores a token by the attention that the embedded question pays to it.

    Softmax over the block per question token and query head, mean over question tokens and the heads of a group, then a
    max-pool over ``window`` neighbours. Source: Spava (arXiv 2601.21444), with softmax instead of raw products.
    """

    name: ClassVar[str] = "query"
    needs_question: ClassVar[bool] = True

    window: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.window % 2 == 0:
            raise UserError(
                "the window of the max-pool must have a middle",
                given=f"compress.window={self.window}",
                allowed="1, 3, 5, ...",
                remedy="Choose an odd compress.window; 1 pools nothing.",
            )

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
            paid_BS = torch.zeros((), device=k_BKSD.device)
            for q_BGQD in q_BHQD[:, j * group : (j + 1) * group].split(rows, dim=2):
                logits_BGQS = (q_BGQD @ k_B1DS).float() * block.scale
                paid_BS = paid_BS + logits_BGQS.softmax(dim=-1).sum(dim=(1, 2))
            per_head.append(paid_BS / (group * q_BHQD.shape[2]))
        scores_BKS = torch.stack(per_head, dim=1)
        return F.max_pool1d(scores_BKS, self.window, stride=1, padding=self.window // 2)
