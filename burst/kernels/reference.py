"""The oracle: plain softmax attention on any device, with S x T scores in memory.

Shapes: B batch, H query heads, K kv heads, G = H / K, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from burst.kernels.base import Checked, Kernel
from burst.merge import accumulate_dtype


def attend(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale q k^T) v and its lse in fp32 (fp64 for fp64); ``out`` is rounded to q's dtype."""
    batch, heads, length, dim = q_BHSD.shape
    kv_heads, keys = k_BKTD.shape[1:3]
    acc = accumulate_dtype(q_BHSD.dtype)
    # The queries of one group become rows of their kv head, so no key is repeated.
    q_BKRD = q_BHSD.to(acc).reshape(batch, kv_heads, heads // kv_heads * length, dim)
    scores_BHST = (q_BKRD @ k_BKTD.to(acc).mT * scale).view(batch, heads, length, keys)
    if causal:
        later_ST = torch.ones(length, keys, dtype=torch.bool, device=q_BHSD.device).triu(1)
        scores_BHST = scores_BHST.masked_fill(later_ST, -math.inf)
    lse_BHS = scores_BHST.logsumexp(-1)
    weights_BKRT = (scores_BHST - lse_BHS.unsqueeze(-1)).exp().view(batch, kv_heads, -1, keys)
    out_BHSE = (weights_BKRT @ v_BKTE.to(acc)).view(batch, heads, length, v_BKTE.shape[3])
    return out_BHSE.to(q_BHSD.dtype), lse_BHS


KERNEL: Kernel = Checked("reference", attend)
