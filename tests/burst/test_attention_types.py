"""Types, strides and precision of distributed attention, and what it keeps for the backward.

Shapes: B batch, H heads, S own tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from burst.execution.attend import attention
from burst.layouts.layout import layout
from burst.transport import Transport, run_virtual
from tests.support.attention_cases import SCHEDULES, Case, compute, dense, inputs, run


def rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["ring", "ulysses", "allgather"])
@pytest.mark.parametrize("backward", ["kv", "q"])
def test_types_and_strides(dtype: torch.dtype, way: str, backward: str) -> None:
    if way == "allgather" and backward == "q":
        pytest.skip("only keys and values travel in an all-gather")
    where = layout("zigzag", 40, 3)
    full = [x.to(dtype) for x in inputs((4, 2), 40, 16, 16, 2)]
    want = dense(Case(3, heads=(4, 2), edges=(0, 40), dim=16, value_dim=16, batch=2))

    def rank(t: Transport, strided: bool) -> list[Tensor]:
        own = [where.shard(x, t.rank, 2) for x in full[:3]]
        if strided:  # a projection's (B, S, H, D), seen as (B, H, S, D); every other element; dense elsewhere
            own[0] = own[0].transpose(1, 2).contiguous().transpose(1, 2)
            own[1] = own[1].repeat_interleave(2, 3)[..., ::2]
        leaves = [x.detach().requires_grad_() for x in own]
        out = attention(*leaves, transport=t, layout=where, schedule=way, backward=backward)
        assert isinstance(out, Tensor) and out.dtype == dtype
        dout = where.shard(full[3], t.rank, 2)
        out.backward(dout.mT.contiguous().mT if strided else dout)
        grads = [x.grad for x in leaves]
        assert all(g is not None and g.dtype == dtype for g in grads)
        return [out.detach(), *(g for g in grads if g is not None)]

    plain, strided = (run_virtual(3, lambda t, s=s: rank(t, s)) for s in (False, True))
    atol = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 8e-3}[dtype]
    for results in (plain, strided):
        for i, y in enumerate(want[:4]):
            assert (where.unshard([r[i] for r in results], 2).double() - y).abs().max() <= atol


def test_expanded_gradient_and_no_gradient() -> None:
    where, (q, k, v, _, _) = layout("zigzag", 30, 2), inputs((4, 2), 30, 8, 8, 1)
    leaf = q.clone().requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(leaf, k, v, is_causal=True, enable_gqa=True).sum().backward()

    def rank(t: Transport) -> Tensor:
        own = [where.shard(x, t.rank, 2) for x in (q, k, v)]
        assert not attention(*own, transport=t, layout=where, schedule="ring").requires_grad
        own[0].requires_grad_()
        attention(*own, transport=t, layout=where, schedule="ring").sum().backward()  # stride 0 everywhere
        assert own[0].grad is not None and own[1].grad is None
        return own[0].grad

    torch.testing.assert_close(where.unshard(run_virtual(2, rank), 2), leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", SCHEDULES)
@pytest.mark.parametrize("kept", [None, 0.25])
def test_nothing_as_long_as_the_sequence_is_kept(way: str, kept: float | None) -> None:
    where, (q, k, v, _, _) = layout("zigzag", 64, 4), inputs((4, 2), 64, 8, 8, 1)

    def rank(t: Transport) -> int:
        own = [where.shard(x, t.rank, 2).requires_grad_() for x in (q, k, v)]
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            attention(*own, transport=t, layout=where, schedule=way, checkpoint=kept)
        return sum(saved)

    kv_heads = 4 if way == "ulysses" else 2  # four members share two kv heads, each keeps its own copy
    outputs = (64 * 4 * 8 + 64 * 4) * (1.0 if kept is None else kept)
    assert sum(run_virtual(4, rank, nodes=(0, 0, 1, 1))) == 64 * 8 * (4 + 2 * kv_heads) + outputs


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_bf16_error_does_not_grow_with_ranks(heads: tuple[int, int]) -> None:
    n = 1024
    base = Case(1, heads=heads, edges=(0, n), dim=64, value_dim=64, dtype=torch.bfloat16)
    want = dense(base)
    leaves = [x.bfloat16().requires_grad_() for x in inputs(heads, n, 64, 64, 1)[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    out.backward(inputs(heads, n, 64, 64, 1)[3].bfloat16())
    one = [rms(x, y) for x, y in zip((out.detach(), *(x.grad for x in leaves)), want[:4], strict=True)]
    for accurate in (False, True):
        for world in (2, 32):
            got, _ = compute(replace(base, world=world, accurate=accurate))
            ratios = [rms(x, y) / e for x, y, e in zip(got[:4], want[:4], one, strict=True)]
            # torch's CPU backward sums dk and dv of a block in bf16, in the smaller steps the shorter the
            # block.
            assert ratios[0] <= (1.2 if accurate else 1.45), (world, ratios)
            assert max(ratios[1:]) <= (1.2 if accurate else 1.5), (world, ratios)


def test_accurate_gradients_of_shared_kv_heads_are_rounded_once() -> None:
    # Eight members share one kv head: its gradient is the sum of eight parts, each from another rank.
    case = Case(8, schedule="ulysses", heads=(8, 1), edges=(0, 64), dtype=torch.bfloat16, accurate=True)
    got, want = compute(case)[0][3], dense(case)[3]
    assert rms(got, want) <= 1.01 * rms(want.bfloat16(), want)
    assert run(replace(case, world=4))["bytes"]


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_autocast_does_not_round(kernel: str) -> None:
    where, full = layout("zigzag", 64, 2), [x.float() for x in inputs((4, 2), 64, 16, 16, 1)[:3]]

    def rank(t: Transport, enabled: bool) -> list[Tensor | None]:
        own = [where.shard(x, t.rank, 2).requires_grad_() for x in full]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attention(*own, transport=t, layout=where, schedule="ring", kernel=kernel)
            out.sum().backward()
        return [out.detach(), *(x.grad for x in own)]

    for plain, cast in zip(*(run_virtual(2, lambda t, on=on: rank(t, on)) for on in (False, True)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


def test_few_ranks_differentiate_short_bf16_blocks_about_as_well_as_one_device() -> None:
    # torch's CPU op adds up dk and dv in bf16, in short steps for blocks of fewer than 768 queries.
    base = Case(2, heads=(8, 2), edges=(0, 1024), dim=64, value_dim=64, dtype=torch.bfloat16)
    want, drawn = dense(base), [x.bfloat16() for x in inputs((8, 2), 1024, 64, 64, 1)[:4]]
    q, k, v = (x.requires_grad_() for x in drawn[:3])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    single = torch.autograd.grad(out, (q, k, v), drawn[3])
    got, _ = compute(base)
    for mine, theirs, exact in zip(got[1:4], single, want[1:4], strict=True):
        assert rms(mine, exact) <= 1.2 * rms(theirs, exact)
