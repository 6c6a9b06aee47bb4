"""Soft-capped kernels against plain softmax in fp64, forward and gradients; tiles, memory, and flash-attn's own caps.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from burst.errors import UserError
from burst.kernels import capped, cuda, flash_attn, kernel, soft_cap
from burst.kernels.merge import accumulate_dtype, merge
from burst.kernels.reference import attend

# (out, lse), absolute; the gradients', RMS of the error over the RMS.
TOLERANCES = {
    torch.float64: (1e-13, 1e-13, 1e-13),
    torch.float32: (5e-6, 5e-6, 2e-6),
    torch.bfloat16: (2e-2, 1e-5, 4e-3),
    torch.float16: (2e-3, 1e-5, 5e-4),
}
CAP, SCALE = 1.3, 0.9  # scores of several caps: most of them are bent
BLOCKS = [(1, 40, False), (7, 7, True), (33, 33, True), (17, 50, False), (50, 17, False)]  # queries, keys, causal
HERE = torch.device("cuda", 0)


def draw(
    queries: int, keys: int, heads: int = 6, kv_heads: int = 2, dim: int = 16, value_dim: int = 24
) -> list[Tensor]:
    gen = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim), (heads, queries, value_dim))
    return [torch.randn(2, *shape, generator=gen, dtype=torch.float64).bfloat16().double() for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return out, lse and the gradients of a whole softmax in fp64, keys repeated, gradients by autograd."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = CAP * (torch.einsum("bhsd,bhtd->bhst", q, k.repeat_interleave(group, 1)) * SCALE / CAP).tanh()
    if causal:
        scores = scores + torch.full_like(scores, -math.inf).triu(1)
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return out.detach(), scores.detach().logsumexp(-1), list(torch.autograd.grad(out, (q, k, v), dout.double()))


def check_equal(name: str, queries: int, keys: int, causal: bool, dtype: torch.dtype, **shape: int) -> None:
    q, k, v, dout = (x.to(dtype) for x in draw(queries, keys, **shape))
    run = capped(kernel(name), CAP)
    out, lse = run(q, k, v, causal=causal, scale=SCALE)
    want_out, want_lse, want = plain(q, k, v, dout, causal)
    out_atol, lse_atol, rtol = TOLERANCES[dtype]
    assert out.dtype == dtype and lse.dtype == accumulate_dtype(dtype)
    torch.testing.assert_close(out.double(), want_out, atol=out_atol, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=lse_atol, rtol=0)
    delta = (dout.double() * want_out).sum(-1).to(lse.dtype)
    for given in ({"out": out}, {"out": None, "delta": delta}):
        grads = run.backward(q, k, v, lse=lse, dout=dout, causal=causal, scale=SCALE, **given)
        for mine, theirs in zip(grads, want, strict=True):
            assert mine.shape == theirs.shape
            assert (mine.double() - theirs).norm() <= rtol * theirs.norm()


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tile", [8, 512])
def test_equals_plain_softmax(name: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_cap, "TILE", tile)
    for queries, keys, causal in BLOCKS:
        check_equal(name, queries, keys, causal, dtype)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 1), (1, 1)])
@pytest.mark.parametrize("dim, value_dim", [(192, 128), (80, 80), (8, 24)])
def test_heads_and_dims(heads: int, kv_heads: int, dim: int, value_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_cap, "TILE", 16)
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim}
    check_equal("cpu", 37, 37, True, torch.float64, **sizes)


def test_parts_merge_to_the_whole() -> None:
    q, k, v, _ = draw(20, 50)
    run = capped(kernel("cpu"), CAP)
    whole = run(q, k, v, causal=False, scale=SCALE)
    parts = [run(q, k[:, :, rows], v[:, :, rows], causal=False, scale=SCALE) for rows in (slice(0, 11), slice(11, 50))]
    for mine, theirs in zip(merge(parts), whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-14, rtol=0)


def test_a_cap_changes_numbers_and_a_wide_one_changes_none() -> None:
    q, k, v, _ = draw(9, 9)
    bare = kernel("cpu")(q, k, v, causal=True)
    assert (capped(kernel("cpu"), 1.0)(q, k, v, causal=True)[0] - bare[0]).abs().max() > 0.01
    torch.testing.assert_close(capped(kernel("cpu"), 1e7)(q, k, v, causal=True), bare, atol=1e-12, rtol=0)
    assert capped(kernel("cpu"), None) is kernel("cpu")


def test_trees_are_capped() -> None:
    q, k, v, _ = draw(5, 5)
    seen = torch.eye(5, dtype=torch.bool) | (torch.arange(5) == 0)
    out, lse = attend(q, k, v, False, SCALE, seen, CAP)
    scores = CAP * (q @ k.repeat_interleave(3, 1).mT * SCALE / CAP).tanh()
    scores = scores.masked_fill(~seen, -math.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(3, 1), atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-13, rtol=0)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return made


@pytest.mark.parametrize("queries, causal", [(4096, True), (1024, False), (1, False)])
def test_memory_is_bounded_on_any_device(queries: int, causal: bool) -> None:
    heads, keys = 4, queries if causal else 20_000
    q, k, v = (torch.empty(1, n, t, 8, device="meta") for n, t in ((heads, queries), (2, keys), (2, keys)))
    run = capped(kernel("auto", "meta"), 50.0)
    with Largest() as seen:
        out, lse = run(q, k, v, causal=causal)
        run.backward(q, k, v, out, lse, out, causal=causal)
    assert seen.elements <= max(heads * soft_cap.TILE**2, k.numel())


def test_empty_blocks_and_mistakes() -> None:
    q, k, v, _ = draw(5, 5)
    out, lse = capped(kernel("cpu"), CAP)(q, k[:, :, :0], v[:, :, :0], causal=False)
    assert not out.any() and bool((lse == -math.inf).all())
    for cap in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="kernel 'cpu': the soft cap must be positive"):
            capped(kernel("cpu"), cap)


class Called:
    """What stands in for flash-attn's functions: it notes its options and answers with the right shapes."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        self.options.append(options)
        return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[0], q.shape[2], q.shape[1]), q, q

    def backward(self, *given: Tensor, **options: Any) -> tuple[Tensor, ...]:
        self.options.append(options)
        q, k, v = given[:3] if len(given) == 6 else given[1:4]  # FA4: q first; FA3: dout first, and the gradients
        return tuple(torch.empty_like(x) for x in (q, k, v))


@pytest.mark.parametrize("name, dim, taken", [("FA3", 256, 1), ("FA3", 512, 0), ("FA4", 128, 1), ("FA4", 256, 0)])
def test_flash_attn_caps_by_itself(name: str, dim: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called()
    monkeypatch.setattr(flash_attn, "best", lambda device: name)
    monkeypatch.setattr(flash_attn, "_activate", lambda device: None)
    monkeypatch.setattr(cuda, "_has_flash", lambda device: True)
    if name == "FA3":
        monkeypatch.setattr(torch.ops.flash_attn_3, "fwd", called.forward, raising=False)
        monkeypatch.setattr(torch.ops.flash_attn_3, "bwd", called.backward, raising=False)
    else:
        module = type("Module", (), {"_flash_attn_fwd": called.forward, "_flash_attn_bwd": called.backward})
        monkeypatch.setattr(flash_attn.importlib, "import_module", lambda path: module)
    block, block_backward = flash_attn.capped(CAP)
    q, k, v, dout = (x.to("meta", torch.bfloat16) for x in draw(9, 9, dim=dim, value_dim=dim))
    out, lse = block(q, k, v, True, SCALE)
    grads = block_backward(q, k, v, soft_cap.Rows(out, lse.float(), dout, None), True, SCALE)
    assert out.shape == dout.shape and lse.shape == q.shape[:3]
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
    causal = {"FA3": "is_causal", "FA4": "causal"}[name]
    assert [(o["softcap"], o["softmax_scale"], o[causal]) for o in called.options] == [(CAP, SCALE, True)] * 2 * taken


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["cuda", "flash_attn"])
def test_a_gpu_equals_plain_softmax(name: str, dim: int, causal: bool) -> None:
    if not torch.cuda.is_available() or (name == "flash_attn" and flash_attn.best(HERE) is None):
        pytest.skip("no such kernel here")
    q, k, v, dout = (x.to(HERE, torch.bfloat16) for x in draw(130, 130, 8, 2, dim, dim))
    run = capped(kernel(name), CAP)
    out, lse = run(q, k, v, causal=causal, scale=SCALE)
    want_out, want_lse, want = plain(q, k, v, dout, causal)
    torch.testing.assert_close(out.double(), want_out, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=0)
    grads = run.backward(q, k, v, out, lse, dout, causal=causal, scale=SCALE)
    assert all((a.double() - b).norm() <= 2e-2 * b.norm() for a, b in zip(grads, want, strict=True))
