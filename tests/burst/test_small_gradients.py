"""Both backwards on finite inputs of any size: vanishing, subnormal and large gradients of single rows.

Shapes: B batch, H query heads, K kv heads, S tokens, D head dim, E value dim.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burst.execution.attend import attention
from burst.kernels.base import row_sums, stand_in
from burst.layouts.layout import layout
from burst.transport import Transport, run_virtual

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, WORLD, DIM = 12, 3, 8


def size_of(dtype: torch.dtype, share: float) -> float:
    """Return a size between the smallest subnormal (0) and the root of the largest number (1)."""
    info = torch.finfo(dtype)
    low, high = math.log2(info.smallest_normal * info.eps), math.log2(info.max) / 2
    return 2.0 ** (low + share * (high - low))


def gradients(full: list[Tensor], dout: Tensor, backward: str) -> list[Tensor]:
    where = layout("zigzag", N, WORLD)

    def rank(t: Transport) -> list[Tensor]:
        own = [where.shard(x, t.rank, 2).clone().requires_grad_() for x in full]
        out = attention(*own, transport=t, layout=where, schedule="ring", backward=backward)
        assert isinstance(out, Tensor)
        out.backward(where.shard(dout, t.rank, 2))
        return [x.grad for x in own if x.grad is not None]

    parts = run_virtual(WORLD, rank)
    return [where.unshard([p[i] for p in parts], 2) for i in range(3)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(TYPES),
    rows=st.lists(st.one_of(st.floats(0, 1), st.none()), min_size=N, max_size=N),
    values=st.floats(0.4, 0.7),
    seed=st.integers(0, 99),
)
def test_both_backwards_agree_on_finite_inputs(
    dtype: torch.dtype, rows: list[float | None], values: float, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(1, heads, N, DIM, generator=gen, dtype=torch.float64) for heads in (2, 1, 1, 2))
    v = (v * size_of(dtype, values)).to(dtype)
    sizes = torch.tensor([0.0 if share is None else size_of(dtype, share) for share in rows], dtype=torch.float64)
    dout = (dout * sizes[:, None]).to(dtype)
    full = [q.to(dtype), k.to(dtype), v]
    by_kv, by_q = gradients(full, dout, "kv"), gradients(full, dout, "q")
    largest = max(float(dout.double().abs().max()), torch.finfo(dtype).smallest_normal)
    reach = largest * max(1.0, float(v.double().abs().max())) * N * DIM
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, x, y in zip(("dq", "dk", "dv"), by_kv, by_q, strict=True):
        fine = x.isfinite()
        assert torch.equal(fine, y.isfinite()), name
        assert ((x - y)[fine].double().abs() <= tolerance * reach).all(), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_the_stand_in_is_no_longer_than_the_output(dtype: torch.dtype, share: float) -> None:
    gen = torch.Generator().manual_seed(0)
    dout, out = (torch.randn(2, 3, 9, DIM, generator=gen, dtype=torch.float64) for _ in range(2))
    dout, out = (dout * size_of(dtype, share)).to(dtype), (out * size_of(dtype, 0.6)).to(dtype)
    made = stand_in(dout, row_sums(dout, out))
    longest = out.double().norm(dim=-1) + torch.finfo(dtype).smallest_normal
    assert made.isfinite().all() and bool((made.double().norm(dim=-1) <= longest * 1.1).all())
