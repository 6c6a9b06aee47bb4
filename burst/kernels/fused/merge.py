"""The merge of two partial attention results as one Triton kernel: every number is read once and written once.

Shapes: B batch, H query heads, S queries, E value dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers of ``out`` a program merges: 32 a thread


# Numbers that change from step to step, of which no wide access depends: one compilation serves them all.
@triton.jit(do_not_specialize=["rows", "al_b", "al_h", "bl_b", "bl_h", "l_b", "l_h"])
def _merge(  # type: ignore[no-untyped-def]
    a_ptr, a_lse_ptr, b_ptr, b_lse_ptr, out_ptr, lse_ptr,
    heads, rows, dim,
    a_b, a_h, a_s, a_e, al_b, al_h, al_s,
    b_b, b_h, b_s, b_e, bl_b, bl_h, bl_s,
    o_b, o_h, o_s, o_e, l_b, l_h, l_s,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Merge ROWS queries of one head; strides are in elements."""
    tiles = tl.cdiv(rows, ROWS)
    pid = tl.program_id(0)
    head_of_all = pid // tiles
    b, h = (head_of_all // heads).to(tl.int64), (head_of_all % heads).to(tl.int64)
    s = ((pid % tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # a long context's offsets pass 2**31
    e = tl.arange(0, DIM)
    here = s < rows
    x = tl.load(a_lse_ptr + b * al_b + h * al_h + s * al_s, mask=here, other=0.0)
    y = tl.load(b_lse_ptr + b * bl_b + h * bl_h + s * bl_s, mask=here, other=0.0)
    # As in ``burst.kernels.merge``: an empty part, -inf, weighs nothing, whatever it meets; NaN stays NaN.
    empty = y == -float("inf")
    weight = tl.where(empty, 0.0, 1.0 / (1.0 + tl.exp(x - y)))
    larger = tl.where(x > y, x, y)
    apart = tl.where(x == y, 0.0, tl.abs(x - y))  # equal infinities have no difference
    lse = larger + tl.log(1.0 + tl.exp(-apart))
    tl.store(lse_ptr + b * l_b + h * l_h + s * l_s, lse, mask=here)
    both = here[:, None] & (e < dim)[None, :]
    a = tl.load(a_ptr + b * a_b + h * a_h + s[:, None] * a_s + e[None, :] * a_e, mask=both, other=0.0).to(tl.float32)
    p = tl.load(b_ptr + b * b_b + h * b_h + s[:, None] * b_s + e[None, :] * b_e, mask=both, other=0.0).to(tl.float32)
    w = weight[:, None]
    # From the nearer end, so that weights 0 and 1 change no bit.
    merged = tl.where(w < 0.5, a + w * (p - a), p - (p - a) * (1.0 - w))
    tl.store(out_ptr + b * o_b + h * o_h + s[:, None] * o_s + e[None, :] * o_e, merged, mask=both)


def merge_pair(a_BHSE: Tensor, a_lse_BHS: Tensor, b_BHSE: Tensor, b_lse_BHS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the merged ``out`` (B, H, S, E) and ``lse`` (B, H, S), both fp32.

    ``a`` and ``b`` are fp32, bf16 or fp16 of any strides, their lse fp32. An fp32 ``a`` is merged into in place and
    returned; otherwise the result has memory of its own. Numerics as ``burst.kernels.merge``'s.
    """
    batch, heads, rows, dim = a_BHSE.shape
    out = a_BHSE if a_BHSE.dtype == torch.float32 else torch.empty_like(a_BHSE, dtype=torch.float32)
    lse = torch.empty_like(a_lse_BHS, memory_format=torch.contiguous_format)
    if not a_BHSE.numel():
        return out, torch.logaddexp(a_lse_BHS, b_lse_BHS)
    width = triton.next_power_of_2(dim)
    tile = min(triton.next_power_of_2(rows), max(1, TILE // width))
    strides = [step for x in (a_BHSE, a_lse_BHS, b_BHSE, b_lse_BHS, out, lse) for step in x.stride()]
    with torch.cuda.device_of(a_BHSE):  # Triton launches on the current device
        _merge[(batch * heads * triton.cdiv(rows, tile),)](
            a_BHSE, a_lse_BHS, b_BHSE, b_lse_BHS, out, lse, heads, rows, dim, *strides, ROWS=tile, DIM=width
        )
    return out, lse
