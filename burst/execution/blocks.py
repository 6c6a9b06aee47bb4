"""Attention of one block of queries over one block of keys, piece by piece, forward and backward.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burst.execution.tiles import tiled
from burst.kernels import Kernel
from burst.kernels.merge import Accumulator, accumulate_dtype
from burst.layouts.masks import MaskPiece

TOKENS = 2  # the dim of tokens in every tensor here

# Keys and values as they travel -> (B, K', T, D) and (B, K', T, E) as attention sees them, for the heads worked on.
Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

AT_ONCE = 4096  # rows that are expanded together


@dataclass(frozen=True)
class Blocks:
    """Runs the pieces of a mask through a kernel; ``accurate`` widens the inputs, so no part is rounded.

    ``expand`` makes keys and values of what travels, ``at_once`` rows at a time: no more of them exist together, and
    each row is expanded once a block, whatever pieces see it. Forward only.
    """

    kernel: Kernel
    scale: float
    accurate: bool = False
    expand: Expand | None = None
    at_once: int = AT_ONCE

    def forward(self, total: Accumulator, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[MaskPiece]) -> None:
        """Merge the attention of q (B, H, S, D) over k (B, K, T, D) and v (B, K, T, E) into ``total``."""
        if self.expand is None:
            self._forward(total, q, k, v, pieces)
            return
        for start in range(0, k.shape[TOKENS], self.at_once):
            stop = min(start + self.at_once, k.shape[TOKENS])
            seen = [part for piece in pieces for part in piece.over(start, stop)]
            if seen:
                self._forward(total, q, *self.expand(k[:, :, start:stop], v[:, :, start:stop]), seen)

    def _forward(self, total: Accumulator, q: Tensor, k: Tensor, v: Tensor, pieces: Iterable[MaskPiece]) -> None:
        if self.accurate:
            q, k, v = _wide(q), _wide(k), _wide(v)
        for tiles in tiled(tuple(pieces)):
            parts = [tiles.cut(q, keys=False), tiles.cut(k, keys=True), tiles.cut(v, keys=True)]
            if tiles.first.flip:
                parts = [x.flip(TOKENS) for x in parts]
            out, lse = self.kernel(*parts, causal=tiles.first.causal, scale=self.scale)
            if tiles.first.flip:
                out, lse = out.flip(TOKENS), lse.flip(TOKENS)
            out, lse = tiles.joined(out, lse)
            whole = lse.shape[TOKENS] == q.shape[TOKENS]
            if not whole:
                begin(total, q, v.shape[3])
            total.add(out, lse, None if whole else tiles.q)

    def backward(
        self,
        given: Mapping[str, Tensor],
        k: Tensor,
        v: Tensor,
        pieces: Sequence[MaskPiece],
        sums: Mapping[str, Tensor],
        fresh: set[str],
    ) -> None:
        """Add the pieces' gradients to ``sums``: dq (B, H, S, D), dk (B, K, T, D), dv (B, K, T, E).

        ``fresh`` names the sums whose memory holds nothing yet; they are begun here and taken off the set.
        ``given`` has q (B, H, S, D), dout (B, H, S, E), the whole softmax's lse (B, H, S), out (B, H, S, E)
        or delta (B, H, S), or both.
        """
        assert self.expand is None, "what is expanded has no gradient"
        acc = accumulate_dtype(k.dtype)
        for piece in pieces:
            rows = {name: _rows(x, piece.q, piece) for name, x in given.items()}
            k_part, v_part = _rows(k, piece.k, piece), _rows(v, piece.k, piece)
            if self.accurate:
                rows = {name: x.to(acc) for name, x in rows.items()}
                k_part, v_part = k_part.to(acc), v_part.to(acc)
            q_part, lse, dout, out, delta = rows["q"], rows["lse"], rows["dout"], rows.get("out"), rows.get("delta")
            grads = self.kernel.backward(
                q_part, k_part, v_part, out, lse, dout, causal=piece.causal, scale=self.scale, delta=delta
            )
            for name, grad, span in zip(("dq", "dk", "dv"), grads, (piece.q, piece.k, piece.k), strict=True):
                grad = grad.flip(TOKENS) if piece.flip else grad
                whole = span.stop - span.start == sums[name].shape[TOKENS]
                if name in fresh and whole:  # saves a pass over the memory to clear it, and one to read it
                    sums[name].copy_(grad)
                else:
                    if name in fresh:
                        sums[name].zero_()
                    sums[name][:, :, span].add_(grad)
                fresh.discard(name)


def begin(total: Accumulator, q: Tensor, value_dim: int) -> None:
    """Give the accumulator an empty part for q's (B, H, S, D) rows, unless it has one: 0 with lse -inf."""
    if not total.ready:
        acc = accumulate_dtype(q.dtype)
        total.add(q.new_zeros((*q.shape[:3], value_dim), dtype=acc), q.new_full(q.shape[:3], -math.inf, dtype=acc))


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let a key without value and with a learned logit a head, ``sinks`` (H,), join the softmax.

    Scales ``out`` (B, H, S, E) in place and returns the new lse (B, H, S).
    Source: attention sinks of gpt-oss: one more term in the denominator.
    """
    whole_BHS = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    out.mul_((lse - whole_BHS).exp().unsqueeze(-1))
    return whole_BHS


def sink_gradient(lse: Tensor, delta: Tensor, sinks: Tensor) -> Tensor:
    """Return the rows' share of the gradient of ``sinks`` (H,): -sum of exp(sink - lse) * delta (B, H, S)."""
    weight_BHS = (sinks.to(lse.dtype)[:, None] - lse).exp()
    return -(weight_BHS * delta).sum((0, 2))


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def _rows(x: Tensor, rows: slice, piece: MaskPiece) -> Tensor:
    part = x[:, :, rows]
    return part.flip(TOKENS) if piece.flip else part
