"""Block kernels: the two functions of a backend, and the checks and special cases that all backends share.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from burst.errors import UserError
from burst.kernels.merge import accumulate_dtype
from burst.registry import Registry

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """A backward's arguments by query row. ``out`` and ``lse`` belong to the whole softmax.

    One of ``out`` and ``delta`` may be missing: a backend that needs ``out`` makes it with ``stand_in``.
    """

    out: Tensor | None  # (B, H, S, E)
    lse: Tensor  # (B, H, S)
    dout: Tensor  # (B, H, S, E), the gradient of out
    delta: Tensor | None  # (B, H, S), the rows' sums of dout * out

    def with_out(self) -> Tensor:
        """Return ``out``, or the tensor that stands in for it."""
        if self.out is not None:
            return self.out
        assert self.delta is not None
        return stand_in(self.dout, self.delta)


# q, k, v, causal, scale -> out, lse; and q, k, v, rows, causal, scale -> dq, dk, dv. Both are called with at least one
# query and one key, checked and unit-strided.
Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Rows, bool, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """Softmax attention of one block of queries over one block of keys, with its log-sum-exp.

    A backend is two functions. The checks and the special cases that backends do not agree on are here. ``device`` is
    the only device type the backend runs on, None for any; ``any_value_dim`` says whether it takes E other than D.
    ``capped`` makes both functions for a soft cap where the backend knows any (``burst/kernels/soft_cap.py``).
    """

    name: str
    block: Forward
    block_backward: Backward
    device: str | None = None
    any_value_dim: bool = True
    capped: Callable[[float], tuple[Forward, Backward]] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend q (B, H, S, D) to k (B, K, T, D) and v (B, K, T, E), where K divides H.

        Returns ``out`` (B, H, S, E) in q's dtype and ``lse`` (B, H, S), natural log with the scale included,
        in fp32 (fp64 for fp64 inputs). Without keys ``out`` is 0 and ``lse`` -inf. ``causal`` is for square
        blocks (S == T) only: backends disagree about the corner of the others, which are composed by merging
        instead. ``scale`` is 1/sqrt(D) when None. Raises UserError when shapes, dtypes, devices or the scale
        do not fit.
        """
        self._check(q, k, v, causal, scale)
        if q.shape[:3].numel() == 0 or k.shape[2] == 0:  # the CPU op divides by zero here and kills the process
            lse_BHS = q.new_full(q.shape[:3], -math.inf, dtype=accumulate_dtype(q.dtype))
            return q.new_zeros((*q.shape[:3], v.shape[3])), lse_BHS
        scale, value_dim = q.shape[3] ** -0.5 if scale is None else scale, v.shape[3]
        q, k, v = self._fitted(q, k, v)
        out, lse_BHS = self.block(q, k, v, causal, scale)
        return out[..., :value_dim], lse_BHS

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        dout: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        delta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return this block's share of dq (B, H, S, D), dk (B, K, T, D) and dv (B, K, T, E).

        They have q's dtype; dk and dv may have the wider one of sums.

        ``out`` (B, H, S, E) and ``lse`` (B, H, S) are those of the WHOLE softmax, merged over all blocks of
        keys, so the shares of all blocks add up to the gradients. ``dout`` (B, H, S, E) is the gradient of
        ``out``. ``delta`` (B, H, S), the rows' sums of dout * out, may stand in for ``out``. Scores are
        computed again, never kept. Raises UserError as the forward does.

        Source: reference identity dS = P * (dP - delta), which holds for every block under a global lse.
        """
        self._check(q, k, v, causal, scale)
        rows = Rows(out, lse, dout, delta)
        self._check_rows(q, v, rows)
        if q.shape[:3].numel() == 0 or k.shape[2] == 0:
            return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        scale, dim, value_dim = q.shape[3] ** -0.5 if scale is None else scale, q.shape[3], v.shape[3]
        q, k, v, dout, *outs = self._fitted(q, k, v, dout, *(() if out is None else (out,)))
        rows = rows._replace(out=outs[0] if outs else None, dout=dout)
        dq, dk, dv = self.block_backward(q, k, v, rows, causal, scale)
        return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]

    def _fitted(self, *tensors: Tensor) -> list[Tensor]:
        """Make last dims dense, and equal for a backend that knows one dim only; zeros change no score or row sum.

        The CPU op reads a strided last dim as if it were dense: wrong numbers, no error. A gradient that comes from
        sum() is one number expanded, with stride 0 everywhere.
        """
        dim = 0 if self.any_value_dim else max(x.shape[3] for x in tensors)
        wide = (pad(x, (0, dim - x.shape[3])) if x.shape[3] < dim else x for x in tensors)
        return [x if x.stride(-1) == 1 else x.contiguous() for x in wide]

    def _check_rows(self, q: Tensor, v: Tensor, rows: Rows) -> None:
        if rows.out is None and rows.delta is None:
            self._reject("backward needs out or delta", "neither", "one of them", "Pass the merged out.")
        acc, states = accumulate_dtype(q.dtype), tuple(q.shape[:3])
        for name, x in rows._asdict().items():
            if x is None:
                continue
            wide = name in ("out", "dout")
            shape = (*states, v.shape[3]) if wide else states
            if tuple(x.shape) != shape:
                given = f"{name} {tuple(x.shape)}"
                self._reject(f"{name} does not fit q and v", given, shape, "Pass the forward's results.")
            if wide and x.dtype != q.dtype:
                self._reject(f"{name} must have q's dtype", x.dtype, q.dtype, f"Cast {name}.")
            if not wide and x.dtype != acc:
                self._reject(f"{name} must not be rounded", x.dtype, acc, "Keep its dtype.")

    def _check(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> None:
        check_inputs(f"kernel '{self.name}'", q, k, v, scale)
        if not q.device == k.device == v.device or self.device not in (None, q.device.type):
            given = f"q {q.device}, k {k.device}, v {v.device}"
            remedy = "Move the tensors, or choose the kernel 'auto'."
            self._reject("the inputs' device does not fit", given, self.device or "one device", remedy)
        if causal and q.shape[2] != k.shape[2]:
            remedy = "Attend to the earlier keys with causal=False and merge the two parts."
            self._reject("causal needs a square block", f"{q.shape[2]} x {k.shape[2]}", "S == T", remedy)

    def _reject(self, message: str, given: object, allowed: object, remedy: str) -> NoReturn:
        reject(f"kernel '{self.name}'", message, given, allowed, remedy)


KERNELS: Registry[Kernel] = Registry("kernel", "burst.kernels", "kernel")  # a backend a file, or another package's


def backend(
    name: str,
    summary: str,
    block: Forward,
    block_backward: Backward,
    device: str | None = None,
    any_value_dim: bool = True,
    capped: Callable[[float], tuple[Forward, Backward]] | None = None,
) -> Kernel:
    """Enter a kernel under ``name`` and return it; ``summary`` is one line for people."""
    return KERNELS.add(name, summary, Kernel(name, block, block_backward, device, any_value_dim, capped))


def check_inputs(who: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Raise UserError, in the name of ``who``, unless these can be q, k and v of one attention."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        reject(who, "q, k and v need 4 dims", shapes, "(batch, heads, tokens, head dim)", "Reshape them.")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        given = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        reject(who, "q, k and v need one float dtype", given, ", ".join(map(str, DTYPES)), "Cast them.")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        reject(who, "k and v do not belong together, or not to q", shapes, "one batch size", "Check k and v.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        remedy = "Pass k and v unrepeated, with a number of kv heads that divides the query heads."
        reject(who, "heads do not group", f"{q.shape[1]} over {k.shape[1]} kv heads", "a whole ratio", remedy)
    if k.shape[3] != q.shape[3] or q.shape[3] == 0:
        reject(who, "q and k differ in head dim", shapes, "one head dim, 1 or more", "Check the projections.")
    if scale is not None and not 0 < scale < math.inf:
        reject(who, "the scale must be positive", scale, "0 < scale < inf", "Leave it None for 1/sqrt(D).")


def reject(who: str, message: str, given: object, allowed: object, remedy: str) -> NoReturn:
    """Raise UserError in the name of ``who``."""
    raise UserError(f"{who}: {message}", given=given, allowed=allowed, remedy=remedy)


def row_sums(dout: Tensor, out: Tensor) -> Tensor:
    """Return delta (B, H, S), the rows' sums of dout * out, both (B, H, S, E), in fp32 (fp64 for fp64)."""
    acc = accumulate_dtype(out.dtype)
    return (dout.to(acc) * out.to(acc)).sum(-1)


def stand_in(dout_BHSE: Tensor, delta_BHS: Tensor) -> Tensor:
    """Return an ``out`` (B, H, S, E) whose row sums with dout are delta: dout * delta / |dout|^2.

    It lets a backend that takes ``out`` run on delta alone: one number a row and head has to travel. By
    Cauchy-Schwarz no row is longer than the true output's, so nothing overflows that did not before.

    Source: measured at fp64 to fp16, gradients are as close to fp64 ones as with the true ``out``.
    """
    # Neither |dout|^2 nor delta / |dout|^2 need be a number of the type where dout is small: rows are first brought
    # to a size between 1 and 2 by a power of two, which rounds nothing.
    size_BHS = dout_BHSE.abs().amax(-1).to(delta_BHS.dtype)
    power_BHS = (size_BHS / size_BHS.frexp().mantissa / 2).masked_fill_(size_BHS == 0, 1.0)
    unit_BHSE = torch.div(dout_BHSE, power_BHS.unsqueeze(-1), out=torch.empty_like(dout_BHSE))
    norm_BHS = torch.linalg.vector_norm(unit_BHSE, dim=-1, dtype=delta_BHS.dtype)
    ratio_BHS = (delta_BHS / power_BHS / norm_BHS / norm_BHS).masked_fill_(size_BHS == 0, 0.0)
    return torch.mul(unit_BHSE, ratio_BHS.unsqueeze(-1), out=unit_BHSE)
