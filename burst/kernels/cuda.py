"""torch's own kernels for NVIDIA devices: flash for bf16 and fp16, memory-efficient for fp32, plain for fp64.

Shapes: B batch, H query heads, K kv heads, G = H / K, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from burst.kernels import reference
from burst.kernels.base import Checked, Kernel

ALIGN = 8  # elements; 16-byte loads of bf16, and a multiple of what fp32 needs
FLASH_MAX_DIM = 256  # largest head dim that flash attention 2 is built for
FLASH_CAPABILITY = (8, 0)  # Ampere


def attend(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call the fastest aten op that takes these inputs; ``out`` (B, H, S, E), ``lse`` (B, H, S).

    Source: ``_scaled_dot_product_flash_attention`` and ``_scaled_dot_product_efficient_attention`` of torch
    2.11 to 2.13. They disagree about causal blocks that are not square; such blocks do not get here.
    """
    if q_BHSD.dtype == torch.float64:
        return reference.attend(q_BHSD, k_BKTD, v_BKTE, causal, scale)
    heads, length, dim = q_BHSD.shape[1:]
    value_dim = v_BKTE.shape[3]
    q, k, v = _aligned(q_BHSD), _aligned(k_BKTD), _aligned(v_BKTE)
    if q.dtype != torch.float32 and value_dim == dim <= FLASH_MAX_DIM and _has_flash(q.device):
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


def _aligned(x_BHSD: Tensor) -> Tensor:
    """Pad the last dim with zeros, and copy what the kernels' vector loads could not read where it lies."""
    if x_BHSD.shape[-1] % ALIGN:
        return pad(x_BHSD, (0, -x_BHSD.shape[-1] % ALIGN))
    if x_BHSD.storage_offset() % ALIGN or any(step % ALIGN for step in x_BHSD.stride()[:-1]):
        return x_BHSD.clone(memory_format=torch.contiguous_format)
    return x_BHSD


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


KERNEL: Kernel = Checked("cuda", attend, device="cuda")
