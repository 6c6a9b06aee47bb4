"""The kernels' backward against autograd through dense attention, alone and as shares of a merged softmax.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from burst.errors import UserError
from burst.kernels import cuda, kernel
from burst.kernels.base import Rows, row_sums, stand_in
from burst.kernels.merge import accumulate_dtype, merge

# RMS of the error over the RMS of the fp64 gradient. The CPU op sums bf16 gradients of kv heads in bf16.
RTOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
HEADS = [(9, 3), (4, 4), (8, 1)]
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(
    heads: tuple[int, int],
    queries: int,
    keys: int,
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
    value_dim: int | None = None,
    device: str = "cpu",
    batch: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v, dout, normal numbers that are exact in ``dtype``."""
    gen = torch.Generator().manual_seed(queries * 1000 + keys)
    value_dim = value_dim or dim
    shapes = [
        (heads[0], queries, dim),
        (heads[1], keys, dim),
        (heads[1], keys, value_dim),
        (heads[0], queries, value_dim),
    ]
    q, k, v, dout = (torch.randn(batch, *s, generator=gen, dtype=torch.float64).to(dtype).to(device) for s in shapes)
    return q, k, v, dout


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, blocks: list[tuple[slice, bool]]) -> list[Tensor]:
    """Return dq, dk, dv in fp64 by autograd through one softmax over all blocks of keys."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    for rows, causal in blocks:
        hidden[:, rows] = torch.ones_like(hidden[:, rows]).triu(1) if causal else False
    out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v.repeat_interleave(group, 1)
    return list(torch.autograd.grad(out, (q, k, v), dout.double()))


def shares(
    name: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, blocks: list[tuple[slice, bool]], by_delta: bool
) -> list[Tensor]:
    """Return the sum of the blocks' gradients, from the merged out and lse."""
    run = kernel(name)
    parts = [run(q, k[:, :, rows], v[:, :, rows], causal=causal) for rows, causal in blocks]
    out, lse = merge(parts, q.dtype)
    delta = row_sums(dout, out)
    acc = accumulate_dtype(q.dtype)
    total = [torch.zeros_like(x, dtype=acc) for x in (q, k, v)]
    for rows, causal in blocks:
        dq, dk, dv = run.backward(
            q, k[:, :, rows], v[:, :, rows], None if by_delta else out, lse, dout, causal=causal,
            delta=delta if by_delta else None,
        )  # fmt: skip
        assert dq.dtype == q.dtype and dk.dtype == dv.dtype and dk.dtype in (q.dtype, acc)
        total[0] += dq
        total[1][:, :, rows] += dk
        total[2][:, :, rows] += dv
    return total


def assert_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for name, x, y in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert x.shape == y.shape
        error = ((x.double() - y).square().mean() / y.square().mean().clamp_min(1e-30)).sqrt().item()
        assert error <= RTOL[dtype], (name, error)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("by_delta", [False, True])
def test_shares_add_up(name: str, dtype: torch.dtype, heads: tuple[int, int], by_delta: bool) -> None:
    for queries, cut, keys, dim in ((1, 1, 4, 16), (7, 7, 20, 40), (17, 17, 17, 32), (129, 129, 200, 64)):
        q, k, v, dout = draw(heads, queries, keys, dim, dtype)
        blocks = [(slice(0, cut), True)] + ([(slice(cut, keys), False)] if keys > cut else [])
        assert_close(shares(name, q, k, v, dout, blocks, by_delta), dense(q, k, v, dout, blocks), dtype)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("layout", ["BSHD", "BHDS", "every_other", "expanded", "sliced"])
def test_strided_inputs(name: str, layout: str) -> None:
    def view(x: Tensor) -> Tensor:
        if x.dim() == 3:  # lse
            return x.mT.contiguous().mT if layout in ("BSHD", "BHDS") else x.repeat_interleave(2, 2)[..., ::2]
        return {
            "BSHD": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
            "BHDS": lambda: x.mT.contiguous().mT,
            "every_other": lambda: x.repeat_interleave(2, 3)[..., ::2],
            "expanded": lambda: x[:, :, :1, :1].expand_as(x),
            "sliced": lambda: torch.cat([x, x, x], 2)[:, :, x.shape[2] : 2 * x.shape[2]],
        }[layout]()

    q, k, v, dout = (view(x) for x in draw((6, 2), 17, 17, 32))
    out, lse = kernel(name)(q, k, v, causal=True)
    got = kernel(name).backward(q, k, v, view(out), view(lse), dout, causal=True)
    plain = [x.contiguous() for x in (q, k, v, view(out), view(lse), dout)]
    for x, y in zip(got, kernel("reference").backward(*plain, causal=True), strict=True):
        assert torch.allclose(x, y, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0), (0, 0)])
def test_empty_blocks(name: str, queries: int, keys: int) -> None:
    q, k, v, dout = draw((6, 2), queries, keys)
    lse = torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for x, y in zip(kernel(name).backward(q, k, v, dout, lse, dout, causal=False), (q, k, v), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and not x.any()


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dim, value_dim", [(16, 24), (96, 64), (192, 128), (576, 512), (512, 512)])
@pytest.mark.parametrize("dtype", RTOL)
def test_head_dims(name: str, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    q, k, v, dout = draw((6, 2), 9, 19, dim, dtype, value_dim)
    blocks = [(slice(0, 9), True), (slice(9, 19), False)]
    for by_delta in (False, True):
        assert_close(shares(name, q, k, v, dout, blocks, by_delta), dense(q, k, v, dout, blocks), dtype)


class EfficientOps:
    """torch's efficient operators, which know no groups and pad the lse, made of plain attention on a CPU."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *options: object, scale: float) -> tuple[Tensor, Tensor]:
        assert q.shape[1] == k.shape[1], "no groups of heads"
        out, lse = kernel("reference")(q, k, v, causal=options[3] is True, scale=scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: object, scale: float) -> list[Tensor]:
        _, out, lse, _, _, _, _, causal = options
        assert isinstance(out, Tensor) and isinstance(lse, Tensor) and lse.shape[2] % 32 == 0
        lse = lse[..., : q.shape[2]]
        run = kernel("reference").backward
        return [*run(q, k, v, out, lse, dout, causal=causal is True, scale=scale), dout]


@pytest.mark.parametrize("heads", [(9, 3), (8, 1), (4, 4)])
@pytest.mark.parametrize("dim, value_dim", [(16, 16), (512, 512), (44, 20)])
def test_groups_of_heads_on_cuda(
    heads: tuple[int, int], dim: int, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = EfficientOps()
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", ops.forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention_backward", ops.backward)
    run = replace(kernel("cuda"), device=None)
    q, k, v, dout = draw(heads, 33, 50, dim, torch.float32, value_dim)
    blocks = [(slice(0, 33), True), (slice(33, 50), False)]
    parts = [run(q, k[:, :, rows], v[:, :, rows], causal=causal) for rows, causal in blocks]
    out, lse = merge(parts, q.dtype)
    grads = [run.backward(q, k[:, :, rows], v[:, :, rows], out, lse, dout, causal=causal) for rows, causal in blocks]
    total = [grads[0][0] + grads[1][0], *(torch.cat([a, b], 2) for a, b in zip(*(g[1:] for g in grads), strict=True))]
    assert_close(total, dense(q, k, v, dout, blocks), torch.float32)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_stand_in_has_the_row_sums(size: float) -> None:
    _, _, _, dout = draw((4, 4), 9, 9)
    out = torch.randn_like(dout)
    dout = (dout * size).float()
    dout[0, 0, 0] = 0.0
    delta = row_sums(dout, out.float())
    made = stand_in(dout, delta)
    assert torch.allclose(row_sums(dout, made) / size, delta / size, atol=1e-5) and not made[0, 0, 0].any()
    assert bool((made.norm(dim=-1) <= out.norm(dim=-1) * 1.0001).all())


def test_mistakes_are_named() -> None:
    q, k, v, dout = draw((6, 2), 7, 7)
    out, lse = kernel("cpu")(q, k, v, causal=True)
    run = kernel("cpu").backward
    with pytest.raises(UserError, match="needs out or delta"):
        run(q, k, v, None, lse, dout, causal=True)
    with pytest.raises(UserError, match="lse does not fit"):
        run(q, k, v, out, lse[:, :, 1:], dout, causal=True)
    with pytest.raises(UserError, match="dout must have q's dtype"):
        run(q, k, v, out, lse, dout.float(), causal=True)
    with pytest.raises(UserError, match="lse must not be rounded"):
        run(q, k, v, out, lse.float(), dout, causal=True)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("dim, value_dim", [(20, 20), (64, 64), (288, 288), (64, 40), (192, 128), (512, 512)])
@pytest.mark.parametrize("dtype", RTOL)
def test_cuda_calls_fit_torchs_schemas(
    monkeypatch: pytest.MonkeyPatch, flash: bool, dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    # Meta tensors run the ops' shape functions without a device: arguments, padding and slicing, no numbers.
    monkeypatch.setattr(cuda, "_has_flash", lambda device: flash)
    q, k, v, dout = draw((9, 3), 17, 129, dim, dtype, value_dim, "meta")
    lse = torch.empty(2, 9, 17, device="meta", dtype=accumulate_dtype(dtype))
    for out, delta in ((dout, None), (None, lse)):
        got = cuda.backward(q, k, v, Rows(out, lse, dout, delta), False, 0.125)
        for x, y in zip(got, (q, k, v), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype


@gpu
@needs_cuda
@pytest.mark.parametrize("dim, value_dim", [(20, 20), (64, 64), (128, 128), (288, 288), (64, 40), (192, 128)])
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("by_delta", [False, True])
def test_cuda_shares_add_up(dim: int, value_dim: int, dtype: torch.dtype, by_delta: bool) -> None:
    for heads in HEADS:
        q, k, v, dout = draw(heads, 129, 200, dim, dtype, value_dim, "cuda")
        blocks = [(slice(0, 129), True), (slice(129, 200), False)]
        assert_close(shares("cuda", q, k, v, dout, blocks, by_delta), dense(q, k, v, dout, blocks), dtype)
