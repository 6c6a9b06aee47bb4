"""Runs the fused merge in Triton's interpreter, in a process of its own: the variable counts when Triton is imported.

Prints one JSON document: for every case the largest error of out and lse beside fp64, and what else is compared.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from burst.kernels import kernel
from burst.kernels.fused.merge import merge_pair

# name: batch, query heads, kv heads, queries, keys of either part, dim, dtype
SHAPES: dict[str, tuple[int, int, int, int, tuple[int, int], int, torch.dtype]] = {
    "fp32": (1, 4, 4, 64, (30, 70), 64, torch.float32),
    "fp32, odd sizes, groups": (2, 9, 3, 37, (11, 5), 20, torch.float32),
    "bf16, groups": (1, 8, 2, 33, (64, 64), 128, torch.bfloat16),
    "fp16, groups": (2, 6, 2, 70, (16, 90), 96, torch.float16),
    "one query": (1, 3, 1, 1, (8, 8), 64, torch.bfloat16),
    "wide": (1, 2, 2, 40, (8, 8), 256, torch.float32),
}


def case(name: str) -> dict[str, Any]:
    """Merge two halves of an attention; ``a`` lies as (B, S, H, E) in memory, as flash kernels leave it."""
    batch, heads, kv_heads, rows, keys, dim, dtype = SHAPES[name]
    gen = torch.Generator().manual_seed(len(name))
    q = torch.randn(batch, heads, rows, dim, generator=gen, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, sum(keys), dim, generator=gen, dtype=torch.float64)
    attend, cut = kernel("reference"), keys[0]
    halves = [attend(q, k[:, :, s], v[:, :, s], causal=False) for s in (slice(cut), slice(cut, None))]
    (a, a_lse), (b, b_lse) = [(out.to(dtype), lse.float()) for out, lse in halves]
    a = a.transpose(1, 2).contiguous().transpose(1, 2)
    a_lse = a_lse.transpose(1, 2).contiguous().transpose(1, 2)
    before = a.clone()
    out, lse = merge_pair(a, a_lse, b, b_lse)
    want, want_lse = exact((before, a_lse), (b, b_lse))
    dense, dense_lse = attend(q, k, v, causal=False)
    return {
        "out": gap(out, want),
        "lse": gap(lse, want_lse),
        "dense": gap(out, dense),
        "dense_lse": gap(lse, dense_lse),
        "dtypes": [str(out.dtype), str(lse.dtype)],
        "in_place": out is a,
        "untouched": torch.equal(a, before),
    }


def exact(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge in fp64."""
    x, y = a[1].double(), b[1].double()
    total = torch.logaddexp(x, y)
    weights = [(each - total).exp()[..., None] for each in (x, y)]
    return a[0].double() * weights[0] + b[0].double() * weights[1], total


def gap(got: Tensor, want: Tensor) -> float:
    """Return the largest difference."""
    return float((got.double() - want.double()).abs().max())


def edges() -> dict[str, Any]:
    """Merge rows that are empty on either side, on both, far apart, and NaN; and rows of a larger accumulator."""
    inf = math.inf
    a_lse = torch.tensor([[[-inf, 1.0, -inf, -300.0, 300.0, math.nan, 2.0]]])
    b_lse = torch.tensor([[[2.0, -inf, -inf, 300.0, -300.0, 1.0, 1.0]]])
    a = torch.arange(1, 8.0).view(1, 1, 7, 1).expand(1, 1, 7, 20).clone()
    b = 10 * a
    b[0, 0, 6, 3] = math.nan
    a[0, 0, [0, 2]] = 0.0  # an empty part's out
    b[0, 0, [1, 2]] = 0.0
    out, lse = merge_pair(a, a_lse, b, b_lse)
    total = torch.zeros(1, 2, 6, 8)
    rows = total[:, :, 2:5]
    part, zero = torch.ones(1, 2, 3, 8), torch.zeros(1, 2, 3)
    returned, _ = merge_pair(rows, zero, part, zero)
    return {
        "out": [repr(float(x)) for x in out[0, 0, :, 0]],
        "lse": [repr(float(x)) for x in lse[0, 0]],
        "nan_stays": bool(out[0, 0, 6].isnan().tolist() == [i == 3 for i in range(20)]),
        "rows": total[0, 0, :, 0].tolist(),
        "same_memory": returned.data_ptr() == rows.data_ptr(),
        "no_rows": list(merge_pair(part[:, :, :0], zero[:, :, :0], part[:, :, :0], zero[:, :, :0])[0].shape),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"cases": {name: case(name) for name in SHAPES}, "edges": edges()}) + "\n")
