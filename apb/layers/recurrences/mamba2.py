"""Mamba2: S_t = e^{A dt_t} S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t.

It is the delta rule's sum without what is taken back: keys B, queries C, values dt x. A stretch multiplies the state by
one number a head, so no second run is needed for its map. Source: Mamba2 (arXiv 2405.21060), section 6.

Shapes: B batch (1), S tokens, G groups, H heads, V head dim, K state dim; states are (B, H, V, K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from apb.layers.recurrences.algebra import PendingTerms, Terms, closed, scanned
from apb.layers.recurrences.base import PIECE, Affine, Mapped, Scan, wide_type
from apb.layers.sharding import cut


@dataclass(frozen=True)
class Mamba2Scan(Scan):
    """One call. ``function``: the model's own, in transformers' signature; None: the scan written out here."""

    name: ClassVar[str] = "mamba2"

    x_BSHV: Tensor
    dt_BSH: Tensor  # time steps as used: bias added, softplus taken, clamped
    b_BSGK: Tensor
    c_BSGK: Tensor
    a_H: Tensor  # below 0
    d_H: Tensor | None
    chunk: int  # tokens of a chunk in ``function``
    function: Callable[..., tuple[Tensor, Tensor]] | None

    @property
    def tokens(self) -> int:
        """Tokens of the call."""
        return self.x_BSHV.shape[1]

    @property
    def state_dtype(self) -> torch.dtype:
        """The type of states."""
        return wide_type(self.x_BSHV)

    @property
    def by_token(self) -> tuple[Tensor, ...]:
        """Values, time steps, keys and queries."""
        return self.x_BSHV, self.dt_BSH, self.b_BSGK, self.c_BSGK

    def blank(self) -> Tensor:
        """Return an uninitialised output, in the states' type."""
        return torch.empty_like(self.x_BSHV, dtype=self.state_dtype, memory_format=torch.contiguous_format)

    def rows(self, start: int, stop: int) -> Self:
        """Return the call of tokens [start, stop) alone."""
        names = ("x_BSHV", "dt_BSH", "b_BSGK", "c_BSGK")
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in names})

    def run(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run from a state (B, H, V, K), piece by piece; None: zero."""
        out_BSHV = self.blank()
        for start, stop in cut(self.tokens, PIECE):
            out_BSHV[:, start:stop], state = self.rows(start, stop)._run_piece(state)
        assert state is not None
        return out_BSHV, state

    def _run_piece(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.function is not None:
            return self.function(
                self.x_BSHV,
                self.dt_BSH,
                self.a_H,
                self.b_BSGK,
                self.c_BSGK,
                chunk_size=self.chunk,
                D=self.d_H,
                z=None,
                initial_states=state,
                return_final_states=True,
            )
        terms, shape = self._terms(), (self.x_BSHV.shape[0], *self.x_BSHV.shape[2:], self.b_BSGK.shape[-1])
        before = self.x_BSHV.new_zeros(shape, dtype=self.state_dtype) if state is None else state
        out_BHSV, state_BHKV = scanned(terms, before.mT)
        return self._out(out_BHSV), state_BHKV.mT.contiguous()

    def mapped(self) -> Mapped:
        """Run from zero; a token's output holds the state before the stretch by its decays up to it."""
        out_BSHV, state_BHVK = self.run(None)
        g_BSH = self._g_BSH()
        wide = self.c_BSGK.to(self.state_dtype)
        c_BSHK = wide.repeat_interleave(self.x_BSHV.shape[2] // wide.shape[2], dim=2)
        reach_BSHK = c_BSHK * g_BSH.cumsum(1).exp()[..., None]
        return Mapped(Affine(g_BSH.sum(1).exp()[..., None, None], state_BHVK), out_BSHV, reach_BSHK, turned=True)

    def map_on(self, before: Affine | None) -> Affine:
        """Return the map of ``before`` and these tokens."""
        if before is not None and before.m is None:
            return Affine(None, self.run(before.u)[1])
        m = self._g_BSH().sum(1).exp()[..., None, None]
        state = self.run(None if before is None else before.u)[1]
        return Affine(m if before is None or before.m is None else m * before.m, state)

    def tree(self, state: Tensor, seen_SS: Tensor) -> tuple[Tensor, PendingTerms]:
        """Run rows of a tree over ``state``."""
        out_BHSV, pending = closed(self._terms(), state.mT, seen_SS)
        return self._out(out_BHSV), replace(pending, turned=True)

    def _g_BSH(self) -> Tensor:
        return self.a_H.to(self.state_dtype) * self.dt_BSH.to(self.state_dtype)

    def _terms(self) -> Terms:
        wide, group = self.state_dtype, self.x_BSHV.shape[2] // self.b_BSGK.shape[2]
        x, dt, b, c = (t.transpose(1, 2).to(wide) for t in (self.x_BSHV, self.dt_BSH, self.b_BSGK, self.c_BSGK))
        b, c = (t.repeat_interleave(group, dim=1) for t in (b, c))
        return Terms(c, b, x * dt[..., None], self._g_BSH().transpose(1, 2)[..., None], None)

    def _out(self, out_BHSV: Tensor) -> Tensor:
        out_BSHV = out_BHSV.transpose(1, 2)
        if self.d_H is not None:
            out_BSHV = out_BSHV + self.d_H.to(out_BSHV.dtype)[:, None] * self.x_BSHV.to(out_BSHV.dtype)
        return out_BSHV.contiguous()
