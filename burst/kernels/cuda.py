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
    states, value_dim = q_BHSD.shape[:3], v_BKTE.shape[3]
    if takes_flash(q_BHSD, v_BKTE):
        q, k, v = flash_inputs(q_BHSD, k_BKTD, v_BKTE)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
        return out[..., :value_dim], lse
    (q,), (k, v) = _ungrouped(causal, k_BKTD.shape[1], (aligned(q_BHSD),), (aligned(k_BKTD), aligned(v_BKTE)))
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    # The op pads its lse to a multiple of 32 queries; out carries the padding of the value dim.
    return out[..., :value_dim].reshape(*states, value_dim), lse[..., : q.shape[2]].reshape(states)


def backward(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, rows: Rows, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the backward of the op that ``attend`` takes, with the whole softmax's out and lse.

    Source: ``_scaled_dot_product_flash_attention_backward`` of torch 2.11 to 2.13 and its efficient
    counterpart; neither takes delta.
    """
    if q_BHSD.dtype == torch.float64:
        return reference.backward(q_BHSD, k_BKTD, v_BKTE, rows, causal, scale)
    dim, value_dim, kv_heads, keys = q_BHSD.shape[3], v_BKTE.shape[3], *k_BKTD.shape[1:3]
    given = (q_BHSD, k_BKTD, v_BKTE, rows.with_out(), rows.dout)
    # Without dropout nothing reads the random state, but the schemas ask for one.
    seed, offset = (torch.zeros(2, dtype=torch.uint64, device=q_BHSD.device) for _ in range(2))
    if takes_flash(q_BHSD, v_BKTE):
        (q, k, v, out, dout), lse = flash_inputs(*given), rows.lse.contiguous()
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], keys, 0.0, causal, seed, offset, scale=scale
        )
        return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]
    q, k, v, out, dout = (aligned(x) for x in given)
    (q, out, dout, lse), (k, v) = _ungrouped(causal, kv_heads, (q, out, dout, rows.lse.unsqueeze(-1)), (k, v))
    # The op reads the lse in the padded form in which its forward writes it: +inf, so that padding weighs 0.
    lse = lse.squeeze(-1).contiguous()
    lse = pad(lse, (0, -lse.shape[2] % LSE_ALIGN), value=math.inf)
    wanted = [True, True, True, False]
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed[0], offset[0], 0.0, wanted, causal, scale=scale
    )
    if dk.shape[1] > kv_heads:  # summed wide: G bf16 terms in a row would lose bits
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
    return dq[..., :dim].reshape(q_BHSD.shape), dk[..., :dim], dv[..., :value_dim]


def takes_flash(q_BHSD: Tensor, v_BKTE: Tensor) -> bool:
    """Return whether the flash operators take these inputs: half precision, dims of up to 256, a device for it."""
    dim = q_BHSD.shape[3]
    return q_BHSD.dtype != torch.float32 and v_BKTE.shape[3] <= dim <= FLASH_MAX_DIM and _has_flash(q_BHSD.device)


def flash_inputs(*tensors: Tensor) -> list[Tensor]:
    """Make tensors fit for the flash operators, which know one dim: shorter values are padded with zeros."""
    dim = max(x.shape[3] for x in tensors)
    return [aligned(pad(x, (0, dim - x.shape[3])) if x.shape[3] < dim else x) for x in tensors]


def _ungrouped(
    causal: bool, kv_heads: int, by_query: tuple[Tensor, ...], by_key: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Give the efficient op, which knows no groups of heads, as many query heads as kv heads.

    Without a mask the queries of a group become rows of one head; keys are repeated for causal blocks alone.
    """
    group = by_query[0].shape[1] // kv_heads
    if group == 1:
        return by_query, by_key
    if causal:
        return by_query, tuple(x.repeat_interleave(group, 1) for x in by_key)
    return tuple(x.reshape(x.shape[0], kv_heads, -1, x.shape[3]) for x in by_query), by_key


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
