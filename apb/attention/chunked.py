"""Blocks longer than memory allows: attention by chunks of the queries, the same but for rounding.

Shapes: B batch (1), S tokens of a chunk, L block tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from apb.kv.layer import LayerKV, Projections
from burst.kernels import Kernel
from burst.kernels.merge import Accumulator


def spans(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut ``tokens`` into [start, stop) of at most ``chunk``."""
    return ((start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


def attend_over(
    q_BHLD: Tensor, parts: Sequence[tuple[Tensor, Tensor, bool]], kernel: Kernel, scale: float, chunk: int
) -> None:
    """Attend to ``parts`` (keys, values, causal) chunk by chunk and leave each chunk's output in place of its queries.

    Only one chunk's partial results exist at a time.
    """
    for start, stop in spans(q_BHLD.shape[2], chunk):
        q_BHSD, merged = q_BHLD[:, :, start:stop], Accumulator()
        for k, v, causal in parts:
            if causal:
                _causal(merged, q_BHSD, k[:, :, :stop], v[:, :, :stop], kernel, scale)
            else:
                merged.add(*kernel(q_BHSD, k, v, causal=False, scale=scale))
        q_BHSD.copy_(merged.finish(q_BHSD.dtype)[0])


def _causal(merged: Accumulator, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, kernel: Kernel, scale: float) -> None:
    """Attend the last S tokens to all earlier ones and to themselves."""
    start = k_BKTD.shape[2] - q_BHSD.shape[2]
    if start:
        merged.add(*kernel(q_BHSD, k_BKTD[:, :, :start], v_BKTD[:, :, :start], causal=False, scale=scale))
    merged.add(*kernel(q_BHSD, k_BKTD[:, :, start:], v_BKTD[:, :, start:], causal=True, scale=scale))


class LocalAttention:
    """Stands in for a model's attention where a block sees nothing but itself: chunks run through all layers in turn.

    Call the model once for every chunk, in order. Nothing but the kept KV outlives a chunk.
    """

    needs_projections = False

    def __init__(self, tokens: int, layers: int, kernel: Kernel, on_layer: Callable[[int], None]) -> None:
        self.kept: list[LayerKV] = []
        self._tokens, self._layers, self._kernel, self._on_layer = tokens, layers, kernel, on_layer
        self._done = 0  # tokens of the chunks before

    def __call__(
        self,
        layer: int,
        q_BHSD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        scale: float,
        projections: Projections | None,
    ) -> Tensor:
        """Keep the chunk's KV, attend to it and to all before it; returns (B, S, H, D)."""
        if layer == len(self.kept):
            b, heads, _, d = k_BKSD.shape
            self.kept.append(LayerKV(*(x.new_empty(b, heads, self._tokens, d) for x in (k_BKSD, v_BKSD))))
        stop = self._done + q_BHSD.shape[2]
        k_BKTD, v_BKTD = (x[:, :, :stop] for x in (self.kept[layer].k_BKTD, self.kept[layer].v_BKTD))
        k_BKTD[:, :, self._done :] = k_BKSD
        v_BKTD[:, :, self._done :] = v_BKSD
        merged = Accumulator()
        _causal(merged, q_BHSD, k_BKTD, v_BKTD, self._kernel, scale)
        if layer == self._layers - 1:
            self._done = stop
            finished = self._layers * stop // self._tokens  # a share of the work, told in layers
            if finished:
                self._on_layer(finished - 1)
        return merged.finish(q_BHSD.dtype)[0].transpose(1, 2)
