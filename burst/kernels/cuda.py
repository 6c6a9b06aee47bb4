"""torch's own kernels for NVIDIA devices: flash for bf16 and fp16, memory-efficient for fp32, plain for fp64.

Shapes: B batch, H query heads, K kv heads, G = H / K, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from burst.kernels import reference
from burst.kernels.base import Rows, backend

ALIGN = 8  # elements; 16-byte loads of bf16, and a multiple of what fp32 needs
FLASH_MAX_DIM = 256  # largest head dim that flash attention 2 is built for
FLASH_CAPABILITY = (8, 0)  # Ampere
LSE_ALIGN = 32  # queries; the efficient op's lse is padded to a multiple of it


def attend(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call the fastest aten op that takes these inputs; ``out`` (B, H, S, E), ``lse`` (B, H, S).

    Source: ``_scaled_dot_product_flash_attention`` and ``_scaled_dot_product_efficient_attention`` of torch
    2.11 to 2.13. They disagree about causal blocks that are not square; such blocks do not get here.
    """
    if q_BHSD.dtype == torch.float64:
        return reference.attend(q_BHSD, k_BKTD, v_BKTE, causal, scale)
    heads, length = q_BHSD.shape[1:3]
    value_dim = v_BKTE.shape[3]
    q, k, v = aligned(q_BHSD), aligned(k_BKTD), aligned(v_BKTE)
    if _takes_flash(q_BHSD, v_BKTE):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        group = heads // k.shape[1]
        if group > 1:  # this op knows no groups; flash does
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )[:2]
    # The efficient op pads its lse to a multiple of 32 queries; out carries the padding of the value dim.
    return out[..., :value_dim], lse[..., :length]


def backward(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, rows: Rows, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the backward of the op that ``attend`` takes, with the whole softmax's out and lse.

    Source: ``_scaled_dot_product_flash_attention_backward`` of torch 2.11 to 2.13 and its efficient
    counterpart; neither takes delta.
    """
    if q_BHSD.dtype == torch.float64:
        return reference.backward(q_BHSD, k_BKTD, v_BKTE, rows, causal, scale)
    dim, value_dim, keys = q_BHSD.shape[3], v_BKTE.shape[3], k_BKTD.shape[2]
    q, k, v, out, dout = (aligned(x) for x in (q_BHSD, k_BKTD, v_BKTE, rows.with_out(), rows.dout))
    lse_BHS = rows.lse.contiguous()
    # Without dropout nothing reads the random state, but the schemas ask for one.
    seed, offset = (torch.zeros(2, dtype=torch.uint64, device=q.device) for _ in range(2))
    if _takes_flash(q_BHSD, v_BKTE):
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse_BHS, None, None, q.shape[2], keys, 0.0, causal, seed, offset, scale=scale
        )
        return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # The op reads the lse in the padded form in which its forward writes it: +inf, so that padding weighs 0.
    lse_BHS = pad(lse_BHS, (0, -lse_BHS.shape[2] % LSE_ALIGN), value=math.inf)
    wanted = [True, True, True, False]
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse_BHS, seed[0], offset[0], 0.0, wanted, causal, scale=scale
    )
    if group > 1:  # summed wide: G bf16 terms in a row would lose bits
        dk, dv = (x.unflatten(1, (-1, group)).sum(2, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
    return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]


def _takes_flash(q_BHSD: Tensor, v_BKTE: Tensor) -> bool:
    dim = q_BHSD.shape[3]
    return q_BHSD.dtype != torch.float32 and v_BKTE.shape[3] == dim <= FLASH_MAX_DIM and _has_flash(q_BHSD.device)


def aligned(x_BHSD: Tensor) -> Tensor:
    """Pad the last dim with zeros, and copy what the kernels' vector loads could not read where it is stored."""
    if x_BHSD.shape[-1] % ALIGN:
        return pad(x_BHSD, (0, -x_BHSD.shape[-1] % ALIGN))
    if x_BHSD.storage_offset() % ALIGN or any(step % ALIGN for step in x_BHSD.stride()[:-1]):
        return x_BHSD.clone(memory_format=torch.contiguous_format)
    return x_BHSD


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


KERNEL = backend("cuda", "torch's kernels for NVIDIA devices", attend, backward, device="cuda")
