"""The oracle: plain softmax attention on any device, with S x T scores in memory.

Shapes: B batch, H query heads, K kv heads, G = H / K, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from burst.kernels.base import Rows, backend, row_sums
from burst.kernels.merge import accumulate_dtype


def attend(
    q_BHSD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    causal: bool,
    scale: float,
    seen_ST: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale q k^T) v and its lse in fp32 (fp64 for fp64); ``out`` is rounded to q's dtype.

    ``seen_ST`` (bool): which keys each query sees, for small blocks such as a draft tree's; at least one each.
    ``soft_cap`` makes scores soft_cap * tanh(score / soft_cap).
    """
    with _as_given(q_BHSD.device):
        q_BKRD, k, v = _grouped(q_BHSD, k_BKTD.shape[1]), _wide(k_BKTD), _wide(v_BKTE)
        scores_BHST = _masked(_scores(q_BKRD, k, q_BHSD.shape, scale, soft_cap), causal)
        if seen_ST is not None:
            scores_BHST = scores_BHST.masked_fill(~seen_ST, -math.inf)
        lse_BHS = scores_BHST.logsumexp(-1)
        weights_BKRT = (scores_BHST - lse_BHS.unsqueeze(-1)).exp().view(*q_BKRD.shape[:3], -1)
        out_BHSE = (weights_BKRT @ v).view(*q_BHSD.shape[:3], v.shape[3])
        return out_BHSE.to(q_BHSD.dtype), lse_BHS


def backward(
    q_BHSD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    rows: Rows,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute P = exp(scale q k^T - lse), dS = P (dO V^T - delta) scale, dS K, dS^T Q and P^T dO.

    Under a ``soft_cap`` dS is multiplied by the slope of the cap, 1 - (capped score / cap)^2.
    """
    with _as_given(q_BHSD.device):
        delta_BHS = row_sums(rows.dout, rows.with_out()) if rows.delta is None else rows.delta
        kv_heads, shape = k_BKTD.shape[1], q_BHSD.shape
        q_BKRD, dout_BKRE = _grouped(q_BHSD, kv_heads), _grouped(rows.dout, kv_heads)
        k, v = _wide(k_BKTD), _wide(v_BKTE)
        scores_BHST = _scores(q_BKRD, k, shape, scale, soft_cap)
        slope_BHST = None if soft_cap is None else 1 - (scores_BHST / soft_cap).square()
        weights_BKRT = (_masked(scores_BHST, causal) - rows.lse.unsqueeze(-1)).exp().view(*q_BKRD.shape[:3], -1)
        delta_BKR1 = delta_BHS.reshape(*q_BKRD.shape[:3], 1)
        dscores_BKRT = weights_BKRT * (dout_BKRE @ v.mT - delta_BKR1) * scale
        if slope_BHST is not None:
            dscores_BKRT = dscores_BKRT * slope_BHST.view(dscores_BKRT.shape)
        dq_BHSD = (dscores_BKRT @ k).view(shape)
        dk_BKTD, dv_BKTE = dscores_BKRT.mT @ q_BKRD, weights_BKRT.mT @ dout_BKRE
        return dq_BHSD.to(q_BHSD.dtype), dk_BKTD.to(q_BHSD.dtype), dv_BKTE.to(q_BHSD.dtype)


def _as_given(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast does not round what is multiplied."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _grouped(x_BHSD: Tensor, kv_heads: int) -> Tensor:
    """Widen, and make the queries of a group rows R = G * S of their kv head, so that no key is repeated."""
    batch, heads, length, dim = x_BHSD.shape
    return _wide(x_BHSD).reshape(batch, kv_heads, heads // kv_heads * length, dim)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def _scores(q_BKRD: Tensor, k_BKTD: Tensor, shape: torch.Size, scale: float, soft_cap: float | None) -> Tensor:
    """Return the scaled and capped scores (B, H, S, T) of all keys."""
    scores_BHST = (q_BKRD @ k_BKTD.mT * scale).view(*shape[:3], k_BKTD.shape[2])
    return scores_BHST if soft_cap is None else (scores_BHST / soft_cap).tanh() * soft_cap


def _masked(scores_BHST: Tensor, causal: bool) -> Tensor:
    """Return the scores with -inf where ``causal`` hides a later key."""
    if not causal:
        return scores_BHST
    later_ST = torch.ones(scores_BHST.shape[2:], dtype=torch.bool, device=scores_BHST.device).triu(1)
    return scores_BHST.masked_fill(later_ST, -math.inf)


KERNEL = backend("reference", "plain softmax, the oracle, on any device", attend, backward)
