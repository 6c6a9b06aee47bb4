"""SnapKV: the end of a block observes which of its tokens matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import COMPRESSORS, Candidates, Compressor
from apb.compress.pool import check_window, mean_pool
from burst.errors import in_range
from burst.registry import option


@COMPRESSORS.register("snapkv", "the tokens that the block's own end attends to most; needs no question")
@dataclass(frozen=True)
class SnapKV(Compressor):
    """Scores a token by the attention it gets from the block's last tokens, mean-pooled over its neighbours.

    Softmax per observer over the tokens it sees, mean over the observers that see a token and the query heads of a
    group. Source: SnapKV (arXiv 2404.14469), section 4. There the observers are kept as well; here they compete,
    because what a block passes on is not much longer than the observation window.
    """

    observers: int = option(32, "tokens at the block's end that observe")
    window: int = option(5, "neighbouring tokens that a score spreads over, by a mean-pool")

    def __post_init__(self) -> None:
        check_window(self.window)
        in_range("compress.observers", self.observers, self.observers >= 1, "1 or more")

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32."""
        k_BKSD = block.k_BKSD
        n_kv, tokens = k_BKSD.shape[1:3]
        observers = min(self.observers, tokens)
        q_BHWD = block.q_BHSD[:, :, tokens - observers :]
        group = q_BHWD.shape[1] // n_kv
        order_S = torch.arange(tokens, device=k_BKSD.device)
        unseen_WS = order_S > order_S[tokens - observers :, None]
        per_head = []
        for j in range(n_kv):
            logits_BGWS = (q_BHWD[:, j * group : (j + 1) * group] @ k_BKSD[:, j : j + 1].transpose(-1, -2)).float()
            weights_BGWS = (logits_BGWS * block.scale).masked_fill(unseen_WS, -torch.inf).softmax(dim=-1)
            per_head.append(weights_BGWS.mean(dim=1).sum(dim=1))
        seen_S = observers - unseen_WS.sum(dim=0)
        return mean_pool(torch.stack(per_head, dim=1) / seen_S, self.window)
