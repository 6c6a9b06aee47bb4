"""Blocks longer than memory allows: attention by chunks of the queries, the same but for rounding.

Shapes: B batch (1), S tokens of a chunk, L block tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from torch import Tensor

from apb.attention.base import Layers
from apb.layers.base import Place, ShardedCache
from apb.layers.call import AttentionCall, Call
from apb.layers.partials import finish
from apb.layers.rows import LayerKV
from apb.plan.plan import PrefillPlan
from burst.execution.blocks import Blocks
from burst.kernels.merge import Accumulator
from burst.layouts.masks import MaskPiece


def spans(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut ``tokens`` into [start, stop) of at most ``chunk``."""
    return ((start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


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
    for start, stop in spans(q_BHLD.shape[2], chunk):
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


class LocalAttention:
    """Stands in for a model's mixers where a block sees nothing but itself: chunks run through all layers in turn.

    Call the model once for every chunk, in order. Nothing but the kept KV outlives a chunk.
    """

    needs_projections = False

    def __init__(self, plan: PrefillPlan, place: Place, on_layer: Callable[[int], None]) -> None:
        self.kept = Layers(plan, place).caches
        self._tokens, self._mixers = plan.host_plans[place.transport.rank].block_len, plan.shape.mixers
        self._kernel, self._on_layer = place.kernel, on_layer
        self._done = 0  # tokens of the chunks before

    def __call__(self, call: Call) -> Tensor:
        """Keep the chunk's KV, attend to it and to all before it; returns (B, S, H, E)."""
        kind, cache = self._mixers[call.layer], cast("ShardedCache", self.kept[call.layer])
        assert kind.sharded and isinstance(call, AttentionCall)
        if not self._done:
            given = (call.k_BKSD, call.v_BKSE)
            cache.fill(LayerKV(*(x.new_empty(*x.shape[:2], self._tokens, x.shape[3]) for x in given)))
        stop = self._done + call.tokens
        kv = cache.context.rows(0, stop)
        if kind.reads is None:
            kv.k_BKTD[:, :, self._done :] = call.k_BKSD
            kv.v_BKTE[:, :, self._done :] = call.v_BKSE
        merged = Accumulator()
        attend_to(merged, call.q_BHSD, kv, kind.blocks(call, self._kernel), causal=True)
        if call.layer == len(self._mixers) - 1:
            self._done = stop
            finished = len(self._mixers) * stop // self._tokens  # a share of the work, told in layers
            if finished:
                self._on_layer(finished - 1)
        return finish(merged, call.q_BHSD.dtype, call.sinks_H)
