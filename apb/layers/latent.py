"""Latent attention (MLA): one latent a token stands for the keys and values of all heads; owners keep the latents.

They travel and are kept as the keys, and their rotated parts as the values, of one head (``LayerKV``). Contexts are
attended to expanded, piece by piece; a few new tokens attend to the latents themselves (``apb.layers.expansion``).

Shapes: B batch (1), H query heads, S new tokens, T cached tokens, D head dim, E value dim, R width of a latent, P of
its rotated part, L = R + P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apb.layers.base import ALL_HEADS, LAYERS, LayerCache, LayerKind, Step
from apb.layers.call import AttentionCall, Call
from apb.layers.expansion import Expansion
from apb.layers.partials import finish, merge_all
from apb.layers.rows import LayerKV, Rows
from apb.layers.softmax import attend_cached
from burst.execution.blocks import AT_ONCE, Blocks, begin
from burst.kernels import Kernel
from burst.kernels.merge import Accumulator
from burst.kernels.reference import attend
from burst.layouts.masks import MaskPiece
from burst.schedules import AttentionShape

HEADS_AT_ONCE = 16  # whose keys and values of a whole block are made together, to be scored


@LAYERS.register("latent", "causal attention whose keys and values are made of one latent a token (MLA)")
@dataclass(frozen=True)
class Latent(LayerKind):
    """Sizes of such a layer: of a head's keys, ``nope`` without rotation and ``rope`` rotated, shared by all heads."""

    sharded: ClassVar[bool] = True
    travels: ClassVar[str] = "latent"

    q_heads: int
    nope: int
    rope: int
    kv_lora: int  # R
    v_dim: int

    @property
    def qk_dim(self) -> int:
        """Numbers of a head's key."""
        return self.nope + self.rope

    @property
    def kv_heads(self) -> int:
        """Heads whose keys and values are made."""
        return self.q_heads

    @property
    def row_dim(self) -> int:
        """Numbers of a token's latent, its rotated part included."""
        return self.kv_lora + self.rope

    @property
    def heads(self) -> int:
        return self.q_heads

    @property
    def rotary_dim(self) -> int:
        return self.rope

    def attention_shape(self, e: int) -> AttentionShape:
        return AttentionShape(
            q_heads=self.q_heads,
            kv_heads=1,
            head_dim=self.qk_dim,
            value_dim=self.v_dim,
            element_size=e,
            state_size=max(4, e),
            partial_size=e,
            carried=(self.kv_lora, self.rope),
        )

    def cache(self, reads: LayerCache | None = None) -> LatentCache:
        assert reads is None
        return LatentCache(self)

    def blocks(self, call: AttentionCall, kernel: Kernel, heads: slice = ALL_HEADS) -> Blocks:
        assert call.latent is not None
        return Blocks(kernel, call.scale, expand=call.latent.of(heads).expand)

    def row_bytes(self, e: int) -> int:
        return self.row_dim * e

    def query_bytes(self, e: int) -> int:
        return self.q_heads * self.qk_dim * e

    def partial_bytes(self, e: int) -> int:
        """The output by head, its values made already, and its LSE (fp32; fp64 for fp64 models)."""
        return self.q_heads * (self.v_dim * e + max(4, e))

    def tail_bytes(self, tokens: int, e: int, owner: bool) -> int:
        return tokens * self.row_bytes(e) if owner else 0

    # -- work -------------------------------------------------------------------------------------------------

    @property
    def pair_flops(self) -> int:
        return 2 * (self.qk_dim + self.v_dim)

    @property
    def absorbed_pair_flops(self) -> int:
        """FLOPs of one query and one latent of one head."""
        return 2 * (self.row_dim + self.kv_lora)

    @property
    def expansion_flops(self) -> int:
        """FLOPs of making one token's key and value of one head."""
        return 2 * self.kv_lora * (self.nope + self.v_dim)

    def absorbs(self, tokens: int) -> bool:
        """True where so many queries cost less over latents than over keys and values that must be made first."""
        return tokens * (self.absorbed_pair_flops - self.pair_flops) <= self.expansion_flops

    def step_flops(self, tokens: int, context: int, rank_tokens: int, owner: bool) -> int:
        """Queries into the latents' space and outputs back are as many as the new tokens' own keys and values, which
        nobody makes: those are among the model's linear layers."""
        pairs = tokens * rank_tokens + (tokens * (tokens + 1) // 2 if owner else 0)
        if self.absorbs(tokens):
            return self.absorbed_pair_flops * self.q_heads * pairs
        return self.q_heads * (self.pair_flops * pairs + self.expansion_flops * rank_tokens)

    # -- memory -----------------------------------------------------------------------------------------------

    def row_work_bytes(self, e: int) -> int:
        """The queries before, during and after RoPE, the latent twice, and two partial outputs in fp32."""
        return (3 * self.q_heads * self.qk_dim + 2 * self.row_dim) * e + 2 * self.q_heads * self.v_dim * 4

    def step_work_bytes(self, e: int) -> int:
        """Over latents: the queries in their space twice, and two partial outputs there in fp32."""
        absorbed = 2 * (self.row_dim * e + self.kv_lora * 4) * self.q_heads
        return self.row_work_bytes(e) + absorbed

    def expansion_bytes(self, rows: int, e: int) -> int:
        return min(rows, AT_ONCE) * self.q_heads * self._made * e

    def scored_bytes(self, rows: int, e: int) -> int:
        return rows * min(self.q_heads, HEADS_AT_ONCE) * self._made * e

    @property
    def _made(self) -> int:
        """Products of the matrix, and the keys that are laid out of it; kernels may want the values as wide as keys."""
        return self.nope + self.v_dim + self.qk_dim + max(self.qk_dim, self.v_dim)

    def whole_row_bytes(self, e: int, exact: bool) -> int:
        out = self.q_heads * self.v_dim * e if self.qk_dim != self.v_dim else 0
        if exact:
            out = 2 * self.q_heads * self.v_dim * max(4, e)
        return (self.q_heads * self.qk_dim + self.row_dim) * e + out


class LatentCache:
    """One host's latents of a layer: its part of the context, and on the owner the tail."""

    def __init__(self, kind: Latent, context_B1TL: Tensor | None = None) -> None:
        self.kind = kind
        self._context_B1TL, self._tail = context_B1TL, Rows()

    @property
    def context(self) -> LayerKV:
        """This host's rows of the context."""
        assert self._context_B1TL is not None
        return self._parts(self._context_B1TL)

    @property
    def tail(self) -> LayerKV | None:
        """The rows of tokens after the context, on the owner; None when there are none."""
        held = self._tail.view()
        return None if held is None else self._parts(held.k_BKTD)

    def fill(self, context: LayerKV) -> None:
        """Keep this host's rows of the context, side by side as one tensor: few queries read both parts as one key."""
        self._context_B1TL = _joined(context)

    def append(self, kv: LayerKV) -> None:
        """Add rows after the context."""
        rows_B1SL = _joined(kv)
        self._tail.append(rows_B1SL, rows_B1SL[..., :0])

    def attend(self, call: Call, step: Step) -> Tensor:
        """Attend to all members' latents, merged exactly; the owner keeps the new ones. Returns (B, S, H, E)."""
        assert isinstance(call, AttentionCall) and call.latent is not None and self._context_B1TL is not None
        held, new = [self._context_B1TL], LayerKV(call.k_BKSD, call.v_BKSE)
        if step.owner:
            earlier = self._tail.view()
            held += [earlier.k_BKTD] if earlier is not None else []
        run = _absorbed if self.kind.absorbs(step.tokens) else _expanded
        own = run(call, call.latent, held, new if step.owner else None, step)
        if step.owner:
            self.append(new)
        if len(step.members) > 1:
            own = merge_all(own, call.q_BHSD.dtype, step.place.transport, f"layer {call.layer}: partial outputs")
        return finish(own, call.q_BHSD.dtype, call.sinks_H)

    def keep(self, rows: Sequence[int]) -> None:
        self._tail.keep(rows)

    def restart(self) -> None:
        self._tail.truncate(0)

    def fork(self, reads: LayerCache | None = None) -> LatentCache:
        assert reads is None
        out = LatentCache(self.kind, self._context_B1TL)
        out._tail = self._tail.copy()
        return out

    def _parts(self, rows_B1TL: Tensor) -> LayerKV:
        return LayerKV(rows_B1TL[..., : self.kind.kv_lora], rows_B1TL[..., self.kind.kv_lora :])


def _absorbed(
    call: AttentionCall, by: Expansion, held: Sequence[Tensor], new: LayerKV | None, step: Step
) -> Accumulator:
    """Attend to the latents themselves: what is merged over hosts has its values' width before it is sent."""
    q_BHSL, kernel, scale, total = by.absorb(call.q_BHSD), step.place.kernel, call.scale, Accumulator()
    width = call.k_BKSD.shape[3]
    for rows_B1TL in held:
        attend_cached(total, q_BHSL, LayerKV(rows_B1TL, rows_B1TL[..., :width]), kernel, scale)
    if new is not None:
        rows_B1SL = _joined(new)
        if step.parents is None:
            total.add(*kernel(q_BHSL, rows_B1SL, rows_B1SL[..., :width], causal=True, scale=scale))
        else:
            seen = step.seen_MM
            total.add(*attend(q_BHSL, rows_B1SL, rows_B1SL[..., :width], False, scale, seen_ST=seen))
    out_BHSR, lse_BHS = total.finish(call.q_BHSD.dtype)
    valued = Accumulator()
    valued.add(by.values(out_BHSR), lse_BHS)
    return valued


def _expanded(
    call: AttentionCall, by: Expansion, held: Sequence[Tensor], new: LayerKV | None, step: Step
) -> Accumulator:
    """Attend to keys and values made of the latents, as a prefill does."""
    blocks, total, width = Blocks(step.place.kernel, call.scale, expand=by.expand), Accumulator(), call.k_BKSD.shape[3]
    for rows_B1TL in held:
        pieces = [MaskPiece(0, step.tokens, 0, rows_B1TL.shape[2])]
        blocks.forward(total, call.q_BHSD, rows_B1TL[..., :width], rows_B1TL[..., width:], pieces)
    if new is not None:
        if step.parents is None:
            pieces = [MaskPiece(0, step.tokens, 0, step.tokens, causal=True)]
            blocks.forward(total, call.q_BHSD, new.k_BKTD, new.v_BKTE, pieces)
        else:
            made = by.expand(new.k_BKTD, new.v_BKTE)
            total.add(*attend(call.q_BHSD, *made, False, call.scale, seen_ST=step.seen_MM))
    begin(total, call.q_BHSD, by.value_dim)  # a host may hold nothing
    return total


def _joined(kv: LayerKV) -> Tensor:
    return torch.cat([kv.k_BKTD, kv.v_BKTE], dim=-1)
