"""Block kernels against the oracle, and the special cases the shared wrapper answers for.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import burst
from burst.errors import UserError
from burst.kernels import KERNELS, Kernel, cuda, cudnn, flash_attn, kernel
from burst.kernels.merge import accumulate_dtype

# (out, lse), absolute. bf16: the first causal rows are single N(0,1) values, rounded at up to 4.
ATOL = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (5e-6, 5e-6),
    torch.bfloat16: (2e-2, 5e-4),
    torch.float16: (2e-3, 5e-4),
}
HEADS = [(9, 3), (4, 4), (8, 1)]
BLOCKS = [(1, 1, True), (7, 7, True), (17, 129, False), (129, 129, True)]  # queries, keys, causal
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(
    heads: tuple[int, int] = (9, 3),
    queries: int = 7,
    keys: int = 7,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    value_dim: int | None = None,
    batch: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(queries * 1000 + keys * 10 + dim)
    shapes = [(heads[0], queries, dim), (heads[1], keys, dim), (heads[1], keys, value_dim or dim)]
    q, k, v = (torch.randn(batch, *shape, generator=gen, dtype=torch.float64) for shape in shapes)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in fp64 with repeated keys: an oracle for the oracle, with another arithmetic."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("bhsd,bhtd->bhst", q.double(), k) * scale
    if causal:
        scores = scores + torch.full_like(scores, -math.inf).triu(1)
    return torch.einsum("bhst,bhtd->bhsd", scores.softmax(-1), v), scores.logsumexp(-1)


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert got[0].dtype == dtype and got[1].dtype == accumulate_dtype(dtype)
    for mine, theirs, atol in zip(got, want, ATOL[dtype], strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs.double(), atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("queries, keys, causal", [(1, 1, True), (7, 7, True), (17, 129, False), (129, 129, True)])
@pytest.mark.parametrize("dtype", ATOL)
def test_equals_dense_attention(
    name: str, heads: tuple[int, int], queries: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    q, k, v = draw(heads, queries, keys, dtype=dtype, batch=2)
    assert_close(kernel(name)(q, k, v, causal=causal, scale=0.3), dense(q, k, v, causal, 0.3), dtype)


# Among them: DeepSeek's expanded heads, its latents as one head, Gemma 4's full layers.
DIMS = [*((n, n) for n in (16, 24, 40, 64, 80, 96, 128, 256, 512)), (192, 128), (576, 512), (96, 64), (16, 48)]


@pytest.mark.parametrize("dim, value_dim", DIMS)
@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("length, causal", [(17, True), (129, False)])
def test_cpu_equals_reference_for_head_dims(
    dim: int, value_dim: int, dtype: torch.dtype, length: int, causal: bool
) -> None:
    q, k, v = draw((6, 2), length, length, dim, dtype, value_dim=value_dim)
    assert_close(kernel("cpu")(q, k, v, causal=causal), kernel("reference")(q, k, v, causal=causal), dtype)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_scale_defaults_to_the_head_dim(name: str) -> None:
    q, k, v = draw(dim=40)
    got, want = (
        kernel(name)(q, k, v, causal=True),
        kernel(name)(q, k, v, causal=True, scale=1 / math.sqrt(40)),
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("queries, keys, causal", [(0, 5, False), (5, 0, False), (0, 0, True), (0, 0, False)])
@pytest.mark.parametrize("dtype", ATOL)
def test_empty_blocks(name: str, queries: int, keys: int, causal: bool, dtype: torch.dtype) -> None:
    out, lse = kernel(name)(*draw(queries=queries, keys=keys, dtype=dtype), causal=causal)
    assert out.shape == (1, 9, queries, 16) and out.dtype == dtype and not out.any()
    assert lse.shape == (1, 9, queries) and lse.dtype == accumulate_dtype(dtype) and bool((lse == -math.inf).all())


def test_empty_batch() -> None:
    out, lse = kernel("cpu")(*draw(batch=0), causal=True)
    assert out.shape == (0, 9, 7, 16) and lse.shape == (0, 9, 7)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("layout", ["BSHD", "BHDS", "every_other", "reversed_heads", "expanded"])
def test_strided_inputs(name: str, layout: str) -> None:
    q, k, v = draw(queries=17, keys=17, dim=32)

    def view(x: Tensor) -> Tensor:
        if layout == "BSHD":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "BHDS":  # the last dim is not the dense one
            return x.mT.contiguous().mT
        if layout == "every_other":
            return x.repeat_interleave(2, 3)[..., ::2]
        if layout == "reversed_heads":
            return x.flip(1).contiguous()[:, list(reversed(range(x.shape[1])))]
        return x[:, :, :1].expand_as(x)

    strided = [view(x) for x in (q, k, v)]
    got = kernel(name)(*strided, causal=True)
    want = kernel(name)(*[x.contiguous() for x in strided], causal=True)
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("keys", [1, 7, 17, 129])
def test_nan_is_not_hidden(name: str, dtype: torch.dtype, keys: int) -> None:
    q, k, v = draw(queries=keys, keys=keys, dtype=dtype)
    row = keys // 2
    q[0, 4, row, 3] = math.nan
    out, lse = kernel(name)(q, k, v, causal=True)
    assert bool(out[0, 4, row].isnan().all()) and bool(lse[0, 4, row].isnan())
    assert int(lse.isnan().sum()) == 1
    q, k, v = draw(queries=keys, keys=keys, dtype=dtype)
    k[0, 1, 0, 3] = math.nan  # the key that every query of heads 3 to 5 sees
    out, lse = kernel(name)(q, k, v, causal=True)
    assert bool(out[0, 3:6].isnan().all()) and bool(lse[0, 3:6].isnan().all())
    assert not bool(out[0, :3].isnan().any() | out[0, 6:].isnan().any())


def test_value_dim() -> None:
    q, k, v = draw(value_dim=24)
    for name in ("reference", "cpu"):  # the CPU op knows one dim
        out, lse = kernel(name)(q, k, v, causal=True)
        assert out.shape[3] == 24
        assert_close((out, lse), dense(q, k, v, True, 0.25), torch.float32)


def test_leaves_inputs_alone_and_works_in_inference_mode() -> None:
    with torch.inference_mode():
        q, k, v = draw()
        before = [x.clone() for x in (q, k, v)]
        for name in ("reference", "cpu"):
            out, _ = kernel(name)(q, k, v, causal=True)
            assert torch.isfinite(out).all()
        assert all(torch.equal(x, y) for x, y in zip(before, (q, k, v), strict=True))


Q, K, V = draw(queries=8, keys=8)
BAD: dict[str, tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = {
    "causal needs a square block": (Q[:, :, :5], K, V, {"causal": True}),
    "need 4 dims": (Q[0], K, V, {}),
    "need one float dtype": (Q, K.bfloat16(), V, {}),
    "heads do not group": (Q[:, :8], K, V, {}),
    "k and v do not belong": (Q, K, V[:, :, :5], {}),
    "differ in head dim": (Q, K[..., :8], V, {}),
    "device does not fit": (Q, K.to("meta"), V, {}),
    "scale must be positive": (Q, K, V, {"scale": -1.0}),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_mistakes_are_named(name: str, message: str) -> None:
    q, k, v, options = BAD[message]
    with pytest.raises(UserError, match=f"kernel '{name}': .*{message}") as error:
        kernel(name)(q, k, v, **{"causal": False, **options})
    assert error.value.given and error.value.allowed and error.value.remedy


@pytest.mark.parametrize(
    "device, dtype, name",
    [
        ("cpu", None, "cpu"),
        ("cpu", torch.float64, "cpu"),
        (torch.device("cuda", 0), torch.bfloat16, "cuda"),
        ("cuda", torch.float64, "reference"),
        ("meta", None, "reference"),
    ],
)
def test_auto(
    device: torch.device | str, dtype: torch.dtype | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn, "installed", tuple)
    chosen: Kernel = kernel("auto", device, dtype)
    assert chosen.name == name


def test_names() -> None:
    assert [kernel(name).name for name in ("reference", "cpu", "cuda")] == ["reference", "cpu", "cuda"]
    with pytest.raises(UserError, match="Did you mean cpu"):
        kernel("cpux")


def test_cuda_kernel_refuses_cpu_tensors() -> None:
    with pytest.raises(UserError, match="kernel 'cuda': the inputs' device"):
        kernel("cuda")(Q, K, V, causal=False)


def test_cuda_alignment() -> None:
    # The helper is plain tensor code and runs anywhere.
    dense_BHSD = torch.randn(1, 2, 3, 16)
    assert cuda.aligned(dense_BHSD) is dense_BHSD
    for odd in (
        torch.randn(1, 2, 3, 20),
        torch.randn(1, 2, 3, 18)[..., :16],
        torch.randn(97)[1:].view(1, 2, 3, 16),
    ):
        fixed = cuda.aligned(odd)
        assert torch.equal(fixed[..., : odd.shape[-1]], odd) and not fixed[..., odd.shape[-1] :].any()
        assert fixed.storage_offset() % 8 == 0 and all(step % 8 == 0 for step in fixed.stride()[:-1])


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("dim, value_dim", [(20, 20), (64, 64), (288, 288), (64, 40), (192, 128), (512, 512)])
@pytest.mark.parametrize("dtype", ATOL)
def test_cuda_calls_fit_torchs_schemas(
    monkeypatch: pytest.MonkeyPatch, flash: bool, dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    # Meta tensors run the ops' shape functions without a device: arguments, padding and slicing, no numbers.
    monkeypatch.setattr(cuda, "_has_flash", lambda device: flash)
    q, k, v = draw((9, 3), 17, 129, dim, dtype, "meta", value_dim)
    out, lse = cuda.attend(q, k, v, False, 0.125)
    assert out.shape == (1, 9, 17, value_dim) and out.dtype == dtype
    assert lse.shape == (1, 9, 17) and lse.dtype == accumulate_dtype(dtype)


@pytest.mark.parametrize("dim", [64, 128])
def test_cudnn_calls_fit_torchs_schema(dim: int) -> None:
    q, k, v = draw((9, 3), 17, 129, dim, torch.bfloat16, "meta", dim)
    out, lse = cudnn.attend(q, k, v, False, 0.125)
    assert out.shape == (1, 9, 17, dim) and out.dtype == torch.bfloat16
    assert lse.shape == (1, 9, 17) and lse.dtype == torch.float32
    for odd in (q[..., :20], q.float()):
        with pytest.raises(UserError, match="not for it"):
            cudnn.attend(odd, k, v, False, 0.125)


@gpu
@needs_cuda
@pytest.mark.parametrize("dim", [64, 128])
def test_cudnn_equals_reference(dim: int) -> None:
    for heads in HEADS:
        for queries, keys, causal in BLOCKS:
            q, k, v = draw(heads, queries, keys, dim, torch.bfloat16, "cuda", dim, batch=2)
            got = kernel("cudnn")(q, k, v, causal=causal)
            assert_close(got, kernel("reference")(q, k, v, causal=causal), torch.bfloat16)


@gpu
@needs_cuda
@pytest.mark.parametrize(
    "dim, value_dim", [(20, 20), (64, 64), (128, 128), (288, 288), (64, 40), (192, 128), (512, 512), (576, 512)]
)
@pytest.mark.parametrize("dtype", ATOL)
def test_cuda_equals_reference(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    for heads in HEADS:
        for queries, keys, causal in BLOCKS:
            q, k, v = draw(heads, queries, keys, dim, dtype, "cuda", value_dim, batch=2)
            got = kernel("cuda")(q, k, v, causal=causal)
            assert_close(got, kernel("reference")(q, k, v, causal=causal), dtype)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", ATOL)
def test_cuda_special_cases(dtype: torch.dtype) -> None:
    run = kernel("cuda")
    out, lse = run(*draw(queries=5, keys=0, dtype=dtype, device="cuda"), causal=False)
    assert not out.any() and bool((lse == -math.inf).all())
    q, k, v = draw(queries=17, keys=17, dim=36, dtype=dtype, device="cuda")
    strided = [x.mT.contiguous().mT for x in (q, k, v)]
    assert_close(run(*strided, causal=True), run(q, k, v, causal=True), dtype)


def test_a_kernel_of_ones_own_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KERNELS, "_found", dict(KERNELS._found))
    KERNELS.add("mine", "the oracle under another name", replace(kernel("reference"), name="mine"))
    where, x = burst.layout("zigzag", 9, 2), torch.randn(1, 2, 9, 8, dtype=torch.float64)

    def rank(t: burst.Transport, name: str) -> Tensor:
        own = where.shard(x, t.rank, 2)
        return burst.attention(own, own, own, transport=t, layout=where, kernel=name)

    mine, theirs = (burst.run_virtual(2, lambda t, name=name: rank(t, name)) for name in ("mine", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    with pytest.raises(UserError, match="unknown kernel 'mien'") as error:
        kernel("mien")
    assert "mine" in error.value.remedy
