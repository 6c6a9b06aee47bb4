"""Merging partial attention by log-sum-exp, against attention over all keys at once.

Shapes: B batch, H heads, S queries, T keys, E value dim.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burst.errors import UserError
from burst.kernels import kernel
from burst.kernels.merge import Accumulator, merge

Part = tuple[Tensor, Tensor]
EMPTY = -math.inf


def split_attention(cuts: list[int], keys: int, seed: int, dtype: torch.dtype) -> tuple[Part, list[Part]]:
    """Return attention over all keys, and over the pieces between the cuts; equal cuts make empty pieces."""
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 6, 5, 16, generator=gen, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, 1, 2, keys, 16, generator=gen, dtype=torch.float64).to(dtype)
    run = kernel("reference")
    edges = [0, *sorted(cuts), keys]
    parts = [run(q, k[:, :, a:b], v[:, :, a:b], causal=False) for a, b in pairwise(edges)]
    return run(q, k, v, causal=False), parts


def part(out: float, lse: float, dtype: torch.dtype = torch.float32) -> Part:
    return torch.full((1, 1, 1, 20), out, dtype=dtype), torch.full((1, 1, 1), lse, dtype=dtype)


def assert_same(got: Part, want: Part) -> None:
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@settings(max_examples=60, deadline=None)
@given(
    keys=st.integers(0, 30),
    cuts=st.lists(st.floats(0, 1), max_size=9),
    seed=st.integers(0, 99),
    rng=st.randoms(),
)
def test_any_split_in_any_order_is_dense_attention(keys: int, cuts: list[float], seed: int, rng: random.Random) -> None:
    want, parts = split_attention([int(c * keys) for c in cuts], keys, seed, torch.float64)
    for order in (parts, rng.sample(parts, len(parts))):
        for mine, theirs in zip(merge(order), want, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("pieces", [2, 9])
def test_lower_precision(dtype: torch.dtype, atol: float, pieces: int) -> None:
    want, parts = split_attention([i * 90 // pieces for i in range(1, pieces)], 90, 0, dtype)
    out, lse = merge(parts, dtype)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, want[0], atol=atol, rtol=0)
    torch.testing.assert_close(lse, want[1], atol=5e-6, rtol=0)
    assert merge(parts)[0].dtype == torch.float32


def test_many_bf16_parts_are_rounded_once() -> None:
    out, _ = merge([part(1.0 + i / 128, 0.0, torch.bfloat16) for i in range(64)], torch.float32)
    torch.testing.assert_close(out, torch.full_like(out, 1 + 63 / 256), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_parts_change_no_bit(dtype: torch.dtype) -> None:
    (out, lse), _ = split_attention([], 30, 1, dtype)
    nothing = torch.zeros_like(out), torch.full_like(lse, EMPTY)
    for order in ([nothing, (out, lse)], [(out, lse), nothing], [nothing, nothing, (out, lse), nothing]):
        assert_same(merge(order), (out, lse))
    assert_same(merge([nothing, nothing]), nothing)
    assert_same(merge([nothing]), nothing)
    mixed_lse = lse.clone()
    mixed_lse[:, ::2] = EMPTY  # some rows empty, others not
    mixed = out * (mixed_lse > EMPTY).unsqueeze(-1), mixed_lse
    merged = merge([mixed, (out, lse)])
    assert torch.equal(merged[0][:, ::2], out[:, ::2]) and torch.equal(merged[1][:, ::2], lse[:, ::2])


@pytest.mark.parametrize("base", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("gap", [100.0, 1e4])
def test_large_gaps_neither_overflow_nor_mix(base: float, gap: float) -> None:
    low, high = part(3.0, base), part(-2.0, base + gap)
    assert_same(merge([low, high]), high)
    assert_same(merge([high, low]), high)


@pytest.mark.parametrize("base", [-1e4, 0.0, 1e4])
def test_equal_lse_means_the_mean_however_large(base: float) -> None:
    out, lse = merge([part(3.0, base), part(-2.0, base)])
    assert_same((out, lse), part(0.5, base + math.log(2)))


@pytest.mark.parametrize("other_lse", [EMPTY, 0.0, 1e4])
@pytest.mark.parametrize("first", [True, False])
def test_nan_stays_visible(other_lse: float, first: bool) -> None:
    other = part(0.0, other_lse)
    for bad in (part(math.nan, 0.0), part(math.nan, math.nan), part(math.nan, EMPTY), part(0.0, math.nan)):
        out, lse = merge([bad, other] if first else [other, bad])
        if bool(bad[0].isnan().any()):
            assert bool(out.isnan().all())
        if bool(bad[1].isnan().any()):
            assert bool(lse.isnan().all())


def test_accumulator_equals_merge_bit_for_bit_and_adopts_the_first_part() -> None:
    _, parts = split_attention([7, 7, 20], 30, 2, torch.float32)
    want = merge(parts)
    with torch.inference_mode():
        total = Accumulator()
        first = parts[0][0].clone()
        total.add(first, parts[0][1])
        assert total.ready
        assert total.finish()[0] is first
        for out, lse in parts[1:]:
            total.add(out, lse)
        assert_same(total.finish(torch.float32), want)
        assert total.finish(torch.bfloat16)[0].dtype == torch.bfloat16


def test_merge_leaves_its_parts_alone() -> None:
    _, parts = split_attention([10], 30, 3, torch.float32)
    copies = [(out.clone(), lse.clone()) for out, lse in parts]
    merge(parts)
    for mine, theirs in zip(parts, copies, strict=True):
        assert_same(mine, theirs)


def test_a_part_for_some_rows_only() -> None:
    _, (a, b) = split_attention([10], 30, 4, torch.float32)
    want_out, want_lse = merge([a, b])
    total = Accumulator()
    total.add(a[0].clone(), a[1].clone())
    total.add(b[0][:, :, 2:], b[1][:, :, 2:], rows=slice(2, None))
    out, lse = total.finish()
    # Where rows start in memory decides which instructions take them: equal to rounding, not to the bit.
    for got, want in ((out, want_out), (lse, want_lse)):
        torch.testing.assert_close(got[:, :, 2:], want[:, :, 2:], atol=5e-6, rtol=0)
    assert_same((out[:, :, :2], lse[:, :, :2]), (a[0][:, :, :2], a[1][:, :, :2]))


def test_misuse() -> None:
    with pytest.raises(UserError, match="nothing to merge"):
        merge([])
    with pytest.raises(AssertionError, match="before the first add"):
        Accumulator().finish()
    assert not Accumulator().ready
    total = Accumulator()
    total.add(*part(1.0, 0.0))
    with pytest.raises(AssertionError, match="does not fit"):
        total.add(torch.zeros(1, 1, 1, 20), torch.zeros(1, 1, 2))
    with pytest.raises(AssertionError, match="is not"):
        total.add(torch.zeros(1, 1, 2, 20), torch.zeros(1, 1, 2))
