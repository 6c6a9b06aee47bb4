"""The gated delta rule: S_t = e^{g_t} S_{t-1} + k_t u_t^T, u_t = beta_t (v_t - e^{g_t} S_{t-1}^T k_t), o_t = S_t^T q_t.

Source: Gated DeltaNet (arXiv 2412.06464), equation 10. A decay a head, or a decay a key channel (Kimi Linear, KDA).

Shapes: B batch (1), S tokens, G key heads, H value heads, K key dim, V value dim, W decays a head (1 or K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from apb.layers.recurrences.algebra import PendingTerms, Terms, closed, scanned
from apb.layers.recurrences.base import KDA_PIECE, PIECE, Affine, Mapped, Scan, wide_type
from apb.layers.sharding import cut

_EPS = 1e-6  # of the normalisation of queries and keys, in transformers and flash-linear-attention alike


@dataclass(frozen=True)
class DeltaScan(Scan):
    """One call. ``function``: the model's own, in transformers' signature; None: the scan written out here."""

    name: ClassVar[str] = "delta"

    q_BSGK: Tensor
    k_BSGK: Tensor
    v_BSHV: Tensor
    g_BSH: Tensor  # (B, S, H); (B, S, H, K) where every channel has a decay of its own
    beta_BSH: Tensor
    normalised: bool  # whether the recurrence normalises queries and keys
    function: Callable[..., tuple[Tensor, Tensor]] | None

    @property
    def tokens(self) -> int:
        """Tokens of the call."""
        return self.q_BSGK.shape[1]

    @property
    def state_dtype(self) -> torch.dtype:
        """The type of states."""
        return wide_type(self.q_BSGK)

    @property
    def by_token(self) -> tuple[Tensor, ...]:
        """Queries, keys, values, decays and steps."""
        return self.q_BSGK, self.k_BSGK, self.v_BSHV, self.g_BSH, self.beta_BSH

    def blank(self) -> Tensor:
        """Return an uninitialised output, in the values' type."""
        return torch.empty_like(self.v_BSHV)

    def rows(self, start: int, stop: int) -> Self:
        """Return the call of tokens [start, stop) alone."""
        names = ("q_BSGK", "k_BSGK", "v_BSHV", "g_BSH", "beta_BSH")
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in names})

    def run(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run from a state (B, H, K, V); None: zero."""
        return self._run(state, widened=False)

    def mapped(self) -> Mapped:
        """Run from zero, with K further columns of values that start at the unit matrix and are given nothing.

        Their state is M, their output what the state before the stretch is multiplied with.
        """
        out_BSHX, state_BHKX = self._run(self._beginning(None), widened=True)
        size = self.v_BSHV.shape[-1]
        return Mapped(_split(state_BHKX, size), out_BSHX[..., :size], out_BSHX[..., size:])

    def map_on(self, before: Affine | None) -> Affine:
        """Return the map of ``before`` and these tokens."""
        if before is not None and before.m is None:
            return Affine(None, self.run(before.u)[1])
        return _split(self._run(self._beginning(before), widened=True)[1], self.v_BSHV.shape[-1])

    def tree(self, state: Tensor, seen_SS: Tensor) -> tuple[Tensor, PendingTerms]:
        """Run rows of a tree over ``state``."""
        out_BHSV, pending = closed(self._terms(self.v_BSHV), state, seen_SS)
        return out_BHSV.transpose(1, 2).to(self.v_BSHV.dtype), pending

    def _run(self, state: Tensor | None, *, widened: bool) -> tuple[Tensor, Tensor]:
        """Run piece by piece; ``widened``: with K columns of nothing behind the values."""
        out: list[Tensor] = []
        for start, stop in cut(self.tokens, KDA_PIECE if self.g_BSH.dim() == 4 else PIECE):
            piece = self.rows(start, stop)
            v_BSHX = piece.v_BSHV
            if widened:
                v_BSHX = torch.cat([v_BSHX, v_BSHX.new_zeros(*v_BSHX.shape[:3], self.q_BSGK.shape[-1])], dim=-1)
            part_BSHX, state = piece._run_piece(v_BSHX, state)
            if stop - start == self.tokens:
                return part_BSHX, state
            out = out or [part_BSHX.new_empty(part_BSHX.shape[0], self.tokens, *part_BSHX.shape[2:])]
            out[0][:, start:stop] = part_BSHX
        assert state is not None
        return out[0], state

    def _run_piece(self, v_BSHX: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.function is not None:
            return self.function(
                self.q_BSGK,
                self.k_BSGK,
                v_BSHX,
                g=self.g_BSH,
                beta=self.beta_BSH,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=self.normalised,
            )
        if state is None:
            state = v_BSHX.new_zeros(self._state_shape(v_BSHX.shape[-1]), dtype=self.state_dtype)
        out_BHSX, state = scanned(self._terms(v_BSHX), state)
        return out_BHSX.transpose(1, 2).to(v_BSHX.dtype), state

    def _terms(self, v_BSHV: Tensor) -> Terms:
        wide, group = self.state_dtype, v_BSHV.shape[2] // self.q_BSGK.shape[2]
        q, k, v, g, beta = (
            x.transpose(1, 2).to(wide) for x in (self.q_BSGK, self.k_BSGK, v_BSHV, self.g_BSH, self.beta_BSH)
        )
        if self.normalised:
            q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPS) for x in (q, k))
        else:
            k = k.clone()  # what a tree leaves pending must be its own
        q, k = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (q, k))
        return Terms(q * q.shape[-1] ** -0.5, k, v, g if g.dim() == 4 else g[..., None], beta)

    def _beginning(self, before: Affine | None) -> Tensor:
        if before is not None:
            assert before.m is not None
            return torch.cat([before.u, before.m], dim=-1)
        size, width = self.v_BSHV.shape[-1], self.q_BSGK.shape[-1]
        state_BHKX = self.v_BSHV.new_zeros(self._state_shape(size + width), dtype=self.state_dtype)
        state_BHKX[..., size:].diagonal(dim1=-2, dim2=-1).fill_(1)
        return state_BHKX

    def _state_shape(self, values: int) -> tuple[int, ...]:
        return self.v_BSHV.shape[0], self.v_BSHV.shape[2], self.q_BSGK.shape[-1], values


def _split(state_BHKX: Tensor, values: int) -> Affine:
    return Affine(state_BHKX[..., values:].contiguous(), state_BHKX[..., :values].contiguous())
