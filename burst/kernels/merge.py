"""Merge partial attention results by their log-sum-exp.

Shapes: B batch, H query heads, S queries, E value dim.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from burst.errors import UserError

WIDENED = 4096  # rows


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which results of ``dtype`` are summed: fp64 for fp64, otherwise fp32.

    Source: bf16 accumulators lose 2 % after 8 parts and 18 % after 64; fp32 ones stay at one bf16 rounding.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


class Accumulator:
    """The running merge of attention over disjoint sets of keys, in the order in which parts are added.

    The order is the caller's, so a schedule gives the same bits however late a part arrives. An empty part is
    ``out`` 0 and ``lse`` -inf and leaves the rest as it was; a NaN in a part stays visible in the result.
    **The first part is adopted, not copied**: it must stay as it is until the next one is added, and later parts may
    be merged into its memory. Use ``merge`` for tensors that must stay as they are. ``ready`` says whether there is a
    part yet. On CUDA devices a merge is one Triton kernel (``burst/kernels/fused/merge.py``) where Triton can run.

    Source: Ring Attention's merge in its sigmoid form, which cannot overflow, with a guard for empty parts.
    """

    def __init__(self) -> None:
        self._out_BHSE: Tensor | None = None
        self._lse_BHS: Tensor | None = None

    @property
    def ready(self) -> bool:
        return self._out_BHSE is not None

    def add(self, out: Tensor, lse: Tensor, rows: slice | None = None) -> None:
        """Merge one part: ``out`` (B, H, S, E) of any float type, ``lse`` (B, H, S) natural log.

        ``rows`` places a part that covers only some of the queries; the first part must cover all of them.
        """
        assert lse.shape == out.shape[:-1], f"lse {tuple(lse.shape)} does not fit out {tuple(out.shape)}"
        if self._out_BHSE is None or self._lse_BHS is None:
            assert rows is None, "the first part must cover every query"
            # Not widened yet: a lone part never has to be, and a merge does it in passing.
            self._out_BHSE, self._lse_BHS = out, lse.to(accumulate_dtype(out.dtype))
            return
        lse = lse.to(self._lse_BHS.dtype)
        if rows is None:
            assert out.shape == self._out_BHSE.shape, f"{tuple(out.shape)} is not {tuple(self._out_BHSE.shape)}"
            self._out_BHSE, self._lse_BHS = _merge_pair(self._out_BHSE, self._lse_BHS, out, lse)
            return
        self._out_BHSE = self._out_BHSE.to(accumulate_dtype(self._out_BHSE.dtype))
        out_rows, lse_rows = self._out_BHSE[:, :, rows], self._lse_BHS[:, :, rows]
        assert out.shape == out_rows.shape, f"{tuple(out.shape)} is not {tuple(out_rows.shape)}"
        lse_rows.copy_(_merge_pair(out_rows, lse_rows, out, lse)[1])

    def finish(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return ``out`` (B, H, S, E), rounded once to ``dtype``, and ``lse`` (B, H, S) in fp32 or fp64."""
        assert self._out_BHSE is not None and self._lse_BHS is not None, "finish() before the first add()"
        return self._out_BHSE.to(dtype or accumulate_dtype(self._out_BHSE.dtype)), self._lse_BHS


def merge(parts: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Merge ``(out, lse)`` pairs, (B, H, S, E) and (B, H, S), from first to last and leave them untouched.

    Returns ``out`` in ``dtype`` (fp32 or fp64 when None) and ``lse``; raises UserError when there is no part.
    """
    if not parts:
        raise UserError("nothing to merge", given="0 parts", allowed="1 part or more", remedy="Pass a part.")
    total = Accumulator()
    for i, (out, lse) in enumerate(parts):
        total.add(out.to(accumulate_dtype(out.dtype), copy=i == 0), lse)
    return total.finish(dtype)


def _merge_pair(out_BHSE: Tensor, lse_BHS: Tensor, part_BHSE: Tensor, part_lse_BHS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the merged out, in the type of sums and in place where ``out_BHSE`` has it, and the new lse."""
    acc = lse_BHS.dtype
    differentiated = torch.is_grad_enabled() and (out_BHSE.requires_grad or part_BHSE.requires_grad)
    if out_BHSE.is_cuda and acc == torch.float32 and not differentiated and _has_triton():
        from burst.kernels.fused.merge import merge_pair

        return merge_pair(out_BHSE, lse_BHS, part_BHSE, part_lse_BHS)
    out_BHSE = out_BHSE.to(acc)
    # -inf - -inf is NaN: an empty part weighs nothing, whatever it meets. (sigmoid(x - -inf) is 1, rightly.)
    weight_BHS = torch.sigmoid(part_lse_BHS - lse_BHS).masked_fill(part_lse_BHS == -math.inf, 0.0)
    # lerp is exact at weights 0 and 1 and needs no temporary of out's size; a part is widened a few rows at a time.
    rows = part_BHSE.shape[2] if part_BHSE.dtype == acc or differentiated else WIDENED
    parts = (x.split(max(1, rows), dim=2) for x in (out_BHSE, part_BHSE, weight_BHS.unsqueeze(-1)))
    for out, part, weight in zip(*parts, strict=True):
        out.lerp_(part.to(acc), weight)
    return out_BHSE, torch.logaddexp(lse_BHS, part_lse_BHS)


@cache
def _has_triton() -> bool:
    """Return whether Triton can run: it compiles what starts a kernel with the system's C compiler."""
    if importlib.util.find_spec("triton") is None:
        return False
    named = importlib.import_module("triton.knobs").build.cc
    return any(shutil.which(compiler) for compiler in ([named] if named else ["gcc", "clang"]))
