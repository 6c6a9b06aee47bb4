"""Partial outputs of new tokens: every host attends to its part of the keys, and all merge all parts alike.

Shapes: B batch (1), H query heads, S new tokens, E value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burst.execution.blocks import add_sinks
from burst.kernels.merge import Accumulator
from burst.transport import Transport


def merge_all(own: Accumulator, dtype: torch.dtype, transport: Transport, step: str) -> Accumulator:
    """Merge all hosts' parts in rank order, so that every host gets the same bits; one message to each peer.

    Outputs travel in ``dtype``, their LSE unrounded. Source: Star Attention, phase 2.
    """
    out_BHSE, lse_BHS = own.finish(dtype)
    packed = _pack(out_BHSE, lse_BHS)
    parts = transport.all_gather(packed, [packed.shape] * transport.world, kind="partials", step=step).wait()
    merged = Accumulator()
    for part in parts:
        merged.add(*_unpack(part, dtype, lse_BHS.dtype))
    return merged


def finish(merged: Accumulator, dtype: torch.dtype, sinks_H: Tensor | None) -> Tensor:
    """Return the output (B, S, H, E) in ``dtype`` of a whole softmax, which its sinks join here and only here."""
    if sinks_H is None:
        return merged.finish(dtype)[0].transpose(1, 2)
    out_BHSE, lse_BHS = merged.finish()
    add_sinks(out_BHSE, lse_BHS, sinks_H)
    return out_BHSE.to(dtype).transpose(1, 2)


def _pack(out_BHSE: Tensor, lse_BHS: Tensor) -> Tensor:
    """Put output and LSE side by side as bytes: one message instead of two."""
    return torch.cat([out_BHSE.contiguous().view(torch.uint8), lse_BHS.contiguous()[..., None].view(torch.uint8)], -1)


def _unpack(packed: Tensor, dtype: torch.dtype, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    split = packed.shape[-1] - lse_dtype.itemsize
    out, lse = packed[..., :split].contiguous(), packed[..., split:].contiguous()
    return out.view(dtype), lse.view(lse_dtype)[..., 0]
