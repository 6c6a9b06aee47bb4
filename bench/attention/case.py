"""One size of causal attention, its inputs, and the plain dense call on one device.

Shapes: H query heads, K kv heads, N tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.settings import AttentionOptions
from burst.errors import UserError, choose
from burst.kernels import kernel
from burst.kernels.base import DTYPES
from burst.layouts.layout import NAMES, Layout, layout
from burst.schedules import AttentionShape


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(AttentionOptions):
    """The options of ``apb bench attention``, and what follows from them."""

    name: str

    def checked(self) -> AttentionSettings:
        """Return the settings with ``auto`` resolved. Raises UserError for what cannot be measured."""
        for key in ("tokens", "ranks", "nodes", "q_heads", "kv_heads", "head_dim", "repeats", "error_tokens"):
            if getattr(self, key) < 1:
                raise _out_of_range(key, getattr(self, key), "1 or more")
        if self.warmup < 0:
            raise _out_of_range("warmup", self.warmup, "0 or more")
        if self.q_heads % self.kv_heads:
            raise _out_of_range("q_heads", self.q_heads, f"a multiple of bench.kv_heads={self.kv_heads}")
        choose("layout", self.layout, NAMES)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        choose("device", device, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
        dtype = self.dtype if self.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
        choose("dtype", dtype, [str(each).removeprefix("torch.") for each in DTYPES])
        return AttentionSettings(**{**self.__dict__, "device": device, "dtype": dtype})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The inputs' type."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def tokens_of(self, count: int) -> Layout:
        """Return the layout of ``count`` tokens."""
        return layout(self.layout, count, self.ranks)

    def shape(self) -> AttentionShape:
        """Return what bytes are counted with; gradients travel in fp32 (fp64 for fp64)."""
        e, d = self.torch_dtype.itemsize, self.head_dim
        wide = max(4, e)
        return AttentionShape(self.q_heads, self.kv_heads, d, d, 1, e, grad_size=wide, state_size=wide, partial_size=e)

    def inputs(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return random q, k, v and the gradient of the output, (1, H or K, N, D)."""
        gen = torch.Generator().manual_seed(0)
        heads = (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        drawn = (torch.randn(1, h, count, self.head_dim, generator=gen, dtype=torch.float64) for h in heads)
        q, k, v, dout = (x.to(self.torch_dtype).to(self.device) for x in drawn)
        return q, k, v, dout

    def flops(self) -> float:
        """FLOPs of the unmasked pairs; the backward computes scores again."""
        pairs = self.tokens * (self.tokens + 1) // 2
        return (4 + (10 if self.backward else 0)) * self.head_dim * self.q_heads * pairs


def dense(whole: tuple[Tensor, ...], backward: bool) -> tuple[Tensor, ...]:
    """Attend q, k, v of ``whole`` (q, k, v, dout) on one device, in one call of its fastest kernel.

    Returns out, and dq, dk, dv with ``backward``.
    """
    q, k, v, dout = whole
    run = kernel("auto", q.device, q.dtype)
    out, lse = run(q, k, v, causal=True)
    return (out, *run.backward(q, k, v, out, lse, dout, causal=True)) if backward else (out,)


def rms_error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Return the largest relative RMS error of a tuple's tensors."""
    errors = []
    for x, y in zip(got, want, strict=True):
        errors.append(((x.double() - y).square().mean() / y.square().mean()).sqrt().item())
    return max(errors)


def _out_of_range(key: str, given: int, allowed: str) -> UserError:
    return UserError(f"bench.{key} is out of range", given=given, allowed=allowed, remedy=f"Change bench.{key}.")
