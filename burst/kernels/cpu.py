"""torch's own flash attention for CPUs, the kernel behind its public attention, which also returns the lse.

Shapes: B batch, H query heads, K kv heads, G = H / K, S queries, T keys, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from burst.kernels.base import Rows, backend

LONG = 768  # queries; from here on the backward works in steps of 256, below in steps of 64 or 32
VECTOR_LANES = 64  # elements; no CPU's vector of fp32 is longer (SVE's 2048 bits)


def attend(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call the aten op: GQA without repeats, fp64 to bf16, any head dim; ``out`` is dense as (B, S, H, D).

    Source: ``_scaled_dot_product_flash_attention_for_cpu``, the same schema in torch 2.11 to 2.13.
    """
    out_BHSD, lse_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHSD, k_BKTD, v_BKTD, 0.0, causal, scale=scale
    )
    if k_BKTD.shape[2] < VECTOR_LANES:
        # With fewer keys than a vector holds, the op takes a row whose scores are all NaN for a masked one
        # and answers 0 with lse 0. A NaN in the query, or in the key that every query sees, is such a case.
        group = q_BHSD.shape[1] // k_BKTD.shape[1]
        first_key_BH1 = k_BKTD[:, :, :1].isnan().any(-1).repeat_interleave(group, 1)
        nan_BHS = q_BHSD.sum(-1).isnan() | first_key_BH1
        out_BHSD = out_BHSD.masked_fill(nan_BHS.unsqueeze(-1), math.nan)
        lse_BHS = lse_BHS.masked_fill(nan_BHS, math.nan)
    return out_BHSD, lse_BHS


def backward(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, rows: Rows, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the aten op with the whole softmax's out and lse; the gradients are dense as (B, S, H, D).

    For bf16 and fp16 the op adds up the gradients of keys and values in that type, step by step and over the query
    heads of a group. Where steps are short, a group's heads are called one by one, and summed, and returned, in fp32.

    Source: ``_scaled_dot_product_flash_attention_for_cpu_backward``, which knows ``out`` but no delta.
    """
    out_BHSD, lse_BHS, dout_BHSD = rows.with_out(), rows.lse, rows.dout
    group = q_BHSD.shape[1] // k_BKTD.shape[1]
    if group == 1 or q_BHSD.shape[2] >= LONG or q_BHSD.dtype in (torch.float32, torch.float64):
        return _call(q_BHSD, k_BKTD, v_BKTD, out_BHSD, lse_BHS, dout_BHSD, causal, scale)
    dq_BHSD = torch.empty_like(q_BHSD)
    dk_BKTD, dv_BKTD = (torch.zeros(x.shape, dtype=torch.float32) for x in (k_BKTD, v_BKTD))
    for member in range(group):
        q, out, lse, dout = (x[:, member::group] for x in (q_BHSD, out_BHSD, lse_BHS, dout_BHSD))
        dq_BHSD[:, member::group], dk, dv = _call(q, k_BKTD, v_BKTD, out, lse.contiguous(), dout, causal, scale)
        dk_BKTD.add_(dk)
        dv_BKTD.add_(dv)
    return dq_BHSD, dk_BKTD, dv_BKTD


def _call(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, dk, dv


KERNEL = backend("cpu", "torch's flash attention for CPUs", attend, backward, device="cpu", any_value_dim=False)
