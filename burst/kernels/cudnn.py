"""cuDNN's attention, by torch's own operator: on Hopper said to be faster than its flash operator.

``auto`` never takes it: it plans for every shape that it meets for the first time, which takes a while.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burst.errors import UserError
from burst.kernels import cuda
from burst.kernels.base import backend

MAX_DIM = 128  # of every device that it runs on; a multiple of 8


def attend(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Call the aten op; raises UserError for types and dims that it does not take.

    Source: ``_scaled_dot_product_cudnn_attention`` of torch 2.11 to 2.13; its lse has a last dim of one.
    """
    dim = q_BHSD.shape[3]
    if q_BHSD.dtype not in (torch.bfloat16, torch.float16) or dim > MAX_DIM or dim % 8:
        raise UserError(
            "kernel 'cudnn': these inputs are not for it",
            given=f"{q_BHSD.dtype}, head dim {dim}",
            allowed=f"bfloat16 or float16, a head dim of up to {MAX_DIM} that 8 divides",
            remedy="Choose the kernel 'auto'.",
        )
    q, k, v = (cuda.aligned(x) for x in (q_BHSD, k_BKTD, v_BKTD))
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out, lse.squeeze(-1)


KERNEL = backend(
    "cudnn", "cuDNN's attention, by torch's operator", attend, cuda.backward, device="cuda", any_value_dim=False
)
