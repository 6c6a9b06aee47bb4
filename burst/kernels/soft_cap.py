"""Soft-capped attention: scores become cap * tanh(score / cap) before the mask, as in Gemma 2.

A backend that knows caps computes with them itself (``Kernel.capped``). torch's own operators know none: for these,
blocks are cut into tiles of plain attention, which are merged by their log-sum-exp.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from burst.errors import UserError
from burst.kernels import reference
from burst.kernels.base import Backward, Forward, Kernel, Rows
from burst.kernels.merge import Accumulator, accumulate_dtype

TILE = 512  # queries; scores of TILE x TILE numbers a head are in memory at once


def capped(kernel: Kernel, cap: float | None) -> Kernel:
    """Return a kernel of the same contract on the same devices that caps its scores; ``kernel`` itself for None.

    The lse is that of the capped scores. Raises UserError for a cap that is no positive number.
    """
    if cap is None:
        return kernel
    check_cap(f"kernel '{kernel.name}'", cap)
    block, block_backward = (kernel.capped or tiled)(cap)
    any_value_dim = True if kernel.capped is None else kernel.any_value_dim
    return replace(kernel, block=block, block_backward=block_backward, any_value_dim=any_value_dim, capped=None)


def check_cap(who: str, cap: float) -> None:
    """Raise UserError, in the name of ``who``, unless scores can be capped so."""
    if not 0 < cap < math.inf:
        raise UserError(
            f"{who}: the soft cap must be positive",
            given=cap,
            allowed="0 < cap < inf",
            remedy="Leave it None for none.",
        )


def tiled(cap: float) -> tuple[Forward, Backward]:
    """Return a forward and a backward of plain torch, of any dims and on any device, in bounded memory."""
    return partial(attend, cap), partial(backward, cap)


def attend(
    cap: float, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with capped scores, tile by tile; sums are in fp32 (fp64 for fp64), ``out`` is rounded once."""
    acc, states = accumulate_dtype(q_BHSD.dtype), q_BHSD.shape[:3]
    out_BHSE, lse_BHS = q_BHSD.new_empty((*states, v_BKTE.shape[3])), q_BHSD.new_empty(states, dtype=acc)
    for rows in _tiles(q_BHSD.shape[2], TILE):
        q, total = q_BHSD[:, :, rows].to(acc), Accumulator()
        for keys, on_diagonal in _keys(rows, k_BKTD.shape[2], causal):
            part = reference.attend(q, k_BKTD[:, :, keys], v_BKTE[:, :, keys], on_diagonal, scale, soft_cap=cap)
            total.add(*part)
        out_BHSE[:, :, rows], lse_BHS[:, :, rows] = total.finish()
    return out_BHSE, lse_BHS


def backward(
    cap: float, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, given: Rows, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq in q's type, dk and dv in the type of sums, from scores that are computed again tile by tile."""
    acc = accumulate_dtype(q_BHSD.dtype)
    dq_BHSD = q_BHSD.new_empty(q_BHSD.shape)
    dk_BKTD, dv_BKTE = (x.new_zeros(x.shape, dtype=acc) for x in (k_BKTD, v_BKTE))
    for rows in _tiles(q_BHSD.shape[2], TILE):
        out, lse, dout, delta = (None if x is None else x[:, :, rows].to(acc) for x in given)
        assert lse is not None and dout is not None
        own = Rows(out, lse, dout, delta)
        q = q_BHSD[:, :, rows].to(acc)
        dq_tile = q.new_zeros(q.shape)
        for keys, on_diagonal in _keys(rows, k_BKTD.shape[2], causal):
            k, v = k_BKTD[:, :, keys], v_BKTE[:, :, keys]
            dq, dk, dv = reference.backward(q, k, v, own, on_diagonal, scale, soft_cap=cap)
            dq_tile += dq
            dk_BKTD[:, :, keys] += dk
            dv_BKTE[:, :, keys] += dv
        dq_BHSD[:, :, rows] = dq_tile
    return dq_BHSD, dk_BKTD, dv_BKTE


def _tiles(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _keys(rows: slice, n_keys: int, causal: bool) -> Iterator[tuple[slice, bool]]:
    """Yield the tiles of keys that the queries ``rows`` see, and whether the tile is on the diagonal.

    Causal tiles are as long as those of queries, so that each is seen wholly or is square. Few queries see more keys.
    """
    if not causal:
        yield from ((keys, False) for keys in _tiles(n_keys, TILE * TILE // min(TILE, rows.stop - rows.start)))
        return
    yield from ((keys, keys.start == rows.start) for keys in _tiles(rows.stop, TILE))
