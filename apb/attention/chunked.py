"""Blocks longer than memory allows: attention by chunks of the queries, the same but for rounding.

Shapes: B batch (1), S tokens of a chunk, L block tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from apb.attention.base import Layers
from apb.layers.base import Place
from apb.layers.call import AttentionCall, Call
from apb.layers.full import Full, FullCache
from apb.layers.partials import finish
from apb.layers.rows import LayerKV
from apb.plan.plan import PrefillPlan
from burst.kernels import Kernel
from burst.kernels.merge import Accumulator


def spans(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut ``tokens`` into [start, stop) of at most ``chunk``."""
    return ((start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


def attend_over(
    out_BHLE: Tensor,
    q_BHLD: Tensor,
    parts: Sequence[tuple[LayerKV, bool]],
    kernel: Kernel,
    scale: float,
    chunk: int,
    sinks_H: Tensor | None,
) -> None:
    """Attend to ``parts`` (rows, causal) chunk by chunk; outputs may take the memory of their queries.

    Only one chunk's partial results exist at a time.
    """
    for start, stop in spans(q_BHLD.shape[2], chunk):
        q_BHSD, merged = q_BHLD[:, :, start:stop], Accumulator()
        for kv, causal in parts:
            if causal:
                _causal(merged, q_BHSD, kv.rows(0, stop), kernel, scale)
            else:
                merged.add(*kernel(q_BHSD, kv.k_BKTD, kv.v_BKTE, causal=False, scale=scale))
        out_BHLE[:, :, start:stop] = finish(merged, q_BHSD.dtype, sinks_H).transpose(1, 2)


def _causal(merged: Accumulator, q_BHSD: Tensor, kv: LayerKV, kernel: Kernel, scale: float) -> None:
    """Attend the last S tokens to all earlier ones and to themselves."""
    start = len(kv) - q_BHSD.shape[2]
    before, own = kv.rows(0, start), kv.rows(start, len(kv))
    if start:
        merged.add(*kernel(q_BHSD, before.k_BKTD, before.v_BKTE, causal=False, scale=scale))
    merged.add(*kernel(q_BHSD, own.k_BKTD, own.v_BKTE, causal=True, scale=scale))


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
        kind, cache = self._mixers[call.layer], self.kept[call.layer]
        assert isinstance(kind, Full) and isinstance(cache, FullCache) and isinstance(call, AttentionCall)
        if not self._done:
            given = (call.k_BKSD, call.v_BKSE)
            cache.fill(LayerKV(*(x.new_empty(*x.shape[:2], self._tokens, x.shape[3]) for x in given)))
        stop = self._done + call.tokens
        kv = cache.context.rows(0, stop)
        if kind.reads is None:
            kv.k_BKTD[:, :, self._done :] = call.k_BKSD
            kv.v_BKTE[:, :, self._done :] = call.v_BKSE
        merged = Accumulator()
        _causal(merged, call.q_BHSD, kv, kind.kernel(self._kernel), call.scale)
        if call.layer == len(self._mixers) - 1:
            self._done = stop
            finished = len(self._mixers) * stop // self._tokens  # a share of the work, told in layers
            if finished:
                self._on_layer(finished - 1)
        return finish(merged, call.q_BHSD.dtype, call.sinks_H)
