"""Blocks longer than memory allows: attention by chunks of the queries, the same but for rounding.

Shapes: B batch (1), S tokens of a chunk, L block tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from apb.attention.base import Prefill
from apb.layers.base import LayerKind, Place, ShardedCache
from apb.layers.call import AttentionCall
from apb.layers.partials import finish
from apb.layers.rows import LayerKV
from apb.layers.sharding import cut
from apb.plan.plan import PrefillPlan
from burst.execution.blocks import Blocks
from burst.kernels.merge import Accumulator
from burst.layouts.masks import MaskPiece


def attend_over(
    out_BHLE: Tensor,
    q_BHLD: Tensor,
    parts: Sequence[tuple[LayerKV, bool]],
    blocks: Blocks,
    chunk: int,
    sinks_H: Tensor | None,
) -> None:
    """Attend to ``parts`` (rows, causal) chunk by chunk; outputs may take the memory of their queries.

    Only one chunk's partial results exist at a time.
    """
    for start, stop in cut(q_BHLD.shape[2], chunk):
        q_BHSD, merged = q_BHLD[:, :, start:stop], Accumulator()
        for kv, causal in parts:
            attend_to(merged, q_BHSD, kv.rows(0, stop) if causal else kv, blocks, causal)
        out_BHLE[:, :, start:stop] = finish(merged, q_BHSD.dtype, sinks_H).transpose(1, 2)


def attend_to(merged: Accumulator, q_BHSD: Tensor, kv: LayerKV, blocks: Blocks, causal: bool) -> None:
    """Attend to all rows; ``causal``: the queries are those of the last rows, and see what is not behind them."""
    tokens, held = q_BHSD.shape[2], len(kv)
    start = held - tokens if causal else held
    pieces = [MaskPiece(0, tokens, 0, start)] if start else []
    if causal:
        pieces.append(MaskPiece(0, tokens, start, held, causal=True))
    blocks.forward(merged, q_BHSD, kv.k_BKTD, kv.v_BKTE, pieces)


class LocalAttention(Prefill):
    """Stands in for a model's mixers where a block sees nothing but itself: chunks run through all layers in turn.

    Call the model once for every chunk, in order. Nothing but the kept KV outlives a chunk.
    """

    def __init__(self, plan: PrefillPlan, place: Place, on_layer: Callable[[int], None]) -> None:
        super().__init__(plan, place, on_layer)
        self._tokens = plan.host_plans[place.transport.rank].block_len
        self._done = self._stop = 0  # tokens of the chunks before, and of this one too

    def _attend(self, call: AttentionCall, kind: LayerKind, cache: ShardedCache) -> Tensor:
        """Keep the chunk's KV, attend to it and to all before it."""
        self._stop = self._done + call.tokens
        if not self._done and kind.reads is None:
            given = (call.k_BKSD, call.v_BKSE)
            cache.fill(LayerKV(*(x.new_empty(*x.shape[:2], self._tokens, x.shape[3]) for x in given)))
        kv = cache.context.rows(0, self._stop)
        if kind.reads is None:
            kv.k_BKTD[:, :, self._done :] = call.k_BKSD
            kv.v_BKTE[:, :, self._done :] = call.v_BKSE
        merged = Accumulator()
        attend_to(merged, call.q_BHSD, kv, kind.blocks(call, self._kernel), causal=True)
        return finish(merged, call.q_BHSD.dtype, call.sinks_H)

    def finished(self, layer: int) -> None:
        """Hear that a chunk's mixer is done; what is told of it is a share of the work, in layers."""
        if layer == len(self._mixers) - 1:
            self._done = self._stop
            share = len(self._mixers) * self._done // self._tokens
            if share:
                self._on_layer(share - 1)
