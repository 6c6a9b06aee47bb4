"""Training-free, question-aware selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apb.compress.base import Candidates, Compressor, Measure
from apb.compress.pool import check_window, max_pool
from burst.errors import choose

_AT_ONCE = 2**24  # probabilities held at a time: 64 MB in fp32, however long the question is


@dataclass(frozen=True)
class Query(Compressor):
    """Scores a token by the attention that the embedded question pays to it.

    Source: Spava (arXiv 2601.21444): raw products, mean, a max-pool of 5. The softmax is ours.

    Parameters: ``logits``: ``softmax`` over the block per question token and query head, so that all of them weigh
    alike, or ``raw`` products; ``reduce``: ``mean`` or ``max`` over question tokens and the query heads of a group;
    ``window``: tokens that the max-pool afterwards spans.
    """

    name: ClassVar[str] = "query"
    needs_question: ClassVar[bool] = True

    window: int = 5
    reduce: Literal["mean", "max"] = "mean"
    logits: Literal["softmax", "raw"] = "softmax"

    def __post_init__(self) -> None:
        check_window(self.window)
        choose("value of compress.reduce:", self.reduce, ("mean", "max"))
        choose("value of compress.logits:", self.logits, ("softmax", "raw"))

    @property
    def measures(self) -> Measure:
        """Shares of attention, or logits where asked for raw ones."""
        return "shares" if self.logits == "softmax" else "logits"

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32."""
        q_BHQD, k_BKSD = block.question_q_BHQD, block.k_BKSD
        assert q_BHQD is not None, "the plan gives every selecting host the question's queries"
        n_kv = k_BKSD.shape[1]
        group = q_BHQD.shape[1] // n_kv
        rows = max(1, _AT_ONCE // (group * k_BKSD.shape[2]))
        mean, per_head = self.reduce == "mean", []
        for j in range(n_kv):
            k_B1DS = k_BKSD[:, j : j + 1].transpose(-1, -2)
            parts_BS = []
            for q_BGQD in q_BHQD[:, j * group : (j + 1) * group].split(rows, dim=2):
                weights_BGQS = (q_BGQD @ k_B1DS).float() * block.scale
                if self.logits == "softmax":
                    weights_BGQS = weights_BGQS.softmax(dim=-1)
                parts_BS.append(weights_BGQS.sum(dim=(1, 2)) if mean else weights_BGQS.amax(dim=(1, 2)))
            found_PBS = torch.stack(parts_BS)
            per_head.append(found_PBS.sum(dim=0) / (group * q_BHQD.shape[2]) if mean else found_PBS.amax(dim=0))
        return max_pool(torch.stack(per_head, dim=1), self.window)
