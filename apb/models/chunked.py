"""A decoder layer over chunks of its tokens: only attention sees all of them at once.

Shapes: B batch (1), S tokens, H query heads, K kv heads, D head dim, E projection width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from apb.attention.chunked import spans
from apb.kv.layer import Projections
from burst.errors import UserError

KEYWORD = "apb_attention"
_BY_TOKEN = ("position_embeddings", "position_ids", "cache_position")  # what layers are given for each token


class Finished(Exception):
    """The last layer's attention is done: nobody reads what would come after it."""


class _Collected(Exception):
    """A chunk's queries, keys and values are here; the rest of its layer waits for attention."""


class InChunks:
    """Stands in for a model's attention while layers run over chunks, twice a layer.

    First every chunk runs as far as its queries, keys and values; attention then sees the whole block at once, as
    strategies that choose among all of its tokens must; then every chunk runs again with its share of the output.
    """

    def __init__(self, attention: Callable[..., Tensor], needs_projections: bool, last: int | None, chunk: int) -> None:
        """``last``: the layer after whose attention nothing more is wanted; None: run to the end."""
        self.needs_projections, self.chunk = needs_projections, chunk
        self._attention, self._last = attention, last
        # Queries, keys and values of all tokens, and the raw projections where asked for. The same memory serves all
        # layers: with its own a layer, kept KV in between would leave holes too small for the next one's.
        self._whole: list[Tensor] = []
        self._out_BSHD: Tensor | None = None
        self._call: tuple[int, float] = (0, 0.0)  # layer and scale
        self._tokens, self._start, self._stop = 0, 0, 0

    def __call__(
        self,
        layer: int,
        q_BHSD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        scale: float,
        projections: Projections | None,
    ) -> Tensor:
        """Keep what a chunk brings, or return its share (B, S, H, D) of the output."""
        if self._out_BSHD is not None:
            return self._out_BSHD[:, self._start : self._stop]
        parts = [x.transpose(1, 2) for x in (q_BHSD, k_BKSD, v_BKSD)]
        if projections is not None:
            parts += [projections.q_BSE, projections.k_BSE, projections.v_BSE]
        if not self._whole:
            self._whole = [x.new_empty(x.shape[0], self._tokens, *x.shape[2:]) for x in parts]
        for whole, part in zip(self._whole, parts, strict=True):
            whole[:, self._start : self._stop] = part
        self._call = (layer, scale)
        raise _Collected

    def run(self, forward: Callable[..., Any], hidden_BSE: Tensor, given: dict[str, Any]) -> Tensor:
        """Run one layer; its output takes the place of its input, so that there is one residual stream only.

        Raises Finished instead of running the rest of a last layer of which nobody wants more.
        """
        self._tokens, self._out_BSHD = hidden_BSE.shape[1], None
        for hidden, options in self._chunks(hidden_BSE, given):
            try:
                forward(hidden, **options)
            except _Collected:
                continue
        self._attend()
        if self._call[0] == self._last:
            raise Finished
        for hidden, options in self._chunks(hidden_BSE, given):
            out = forward(hidden, **options)
            if not isinstance(out, Tensor):
                raise _unfit(f"a layer returns {type(out).__name__}")
            hidden.copy_(out)
        self._out_BSHD = None
        return hidden_BSE

    def _chunks(self, hidden_BSE: Tensor, given: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for start, stop in spans(self._tokens, self.chunk):
            self._start, self._stop = start, stop
            options = {name: self._cut(name, value) for name, value in given.items()}
            yield hidden_BSE[:, start:stop], options

    def _attend(self) -> None:
        q_BHSD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in self._whole[:3])
        projections = Projections(*self._whole[3:]) if self.needs_projections else None
        layer, scale = self._call
        self._out_BSHD = self._attention(layer, q_BHSD, k_BKSD, v_BKSD, scale, projections)

    def _cut(self, name: str, value: Any) -> Any:
        """Cut what a layer is given to the chunk's tokens."""
        if isinstance(value, tuple) and name in _BY_TOKEN:
            return tuple(self._cut(name, x) for x in value)
        if not isinstance(value, Tensor):
            return value
        along = min(1, value.dim() - 1)
        if name not in _BY_TOKEN or value.shape[along] != self._tokens:
            raise _unfit(f"its layers are given {name} {tuple(value.shape)}")
        return value.narrow(along, self._start, self._stop - self._start)


def chunkable(layer: nn.Module) -> None:
    """Let a decoder layer run over chunks when the attention it is handed asks for it."""
    forward = layer.forward
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def run(*args: Any, **keywords: Any) -> Any:
        attention = keywords.get(KEYWORD)
        if not isinstance(attention, InChunks):
            return forward(*args, **keywords)
        given = dict(zip(names, args, strict=False)) | keywords
        return attention.run(forward, given.pop(names[0]), given)

    layer.forward = run


def _unfit(why: str) -> UserError:
    return UserError(
        f"this model's layers cannot run in chunks: {why}",
        given="chunk_tokens",
        allowed=f"layers that take {', '.join(_BY_TOKEN)} for each token and return one tensor",
        remedy="Set chunk_tokens=null.",
    )
