"""A decoder layer over chunks of its tokens: only attention sees all of them at once.

Shapes: B batch (1), S tokens, H query heads, K kv heads, D head dim, E projection width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from apb.attention.base import Prefill
from apb.layers.base import LayerKind
from apb.layers.call import AttentionCall, Call
from apb.layers.linear import Linear
from apb.layers.linear_chunks import LinearChunks
from apb.layers.mixing import ConvCall
from apb.layers.rows import Projections
from apb.layers.sharding import Interval, cut
from apb.models.hooks import KEYWORD, active_positions, placed
from burst.errors import UserError

# What layers are given for each token.
_BY_TOKEN = ("position_embeddings", "position_ids", "cache_position", "per_layer_input")


class Finished(Exception):
    """The last layer's attention is done: nobody reads what would come after it."""


class _Collected(Exception):
    """Inputs of a chunk's mixers are here; the rest of its layer waits for them."""


class InChunks:
    """Stands in for a model's mixers while layers run over chunks, twice a layer.

    First every chunk runs as far as its queries, keys and values; attention then sees the whole block at once, as
    strategies that choose among all of its tokens must; then every chunk runs again with its share of the output.
    Linear layers never see the whole: see ``apb.layers.linear_chunks``.
    """

    def __init__(self, attention: Prefill, mixers: Sequence[LayerKind], chunk: int, *, to_the_end: bool) -> None:
        """``to_the_end``: whether anything is wanted of what comes after the last mixer."""
        self.needs_projections, self.chunk = attention.needs_projections, chunk
        self._attention, self._kinds, self._last = attention, mixers, None if to_the_end else len(mixers) - 1
        self._reads = [kind.reads for kind in mixers]
        # Queries, keys and values of all tokens, and the raw projections where asked for. The same memory serves all
        # layers of equal sizes: with its own a layer, kept KV would leave holes too small for the next one's.
        self._whole: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values that later mixers read, by mixer
        self._mixers: tuple[int, ...] = ()  # of the layer under way
        self._linear: dict[int, LinearChunks] = {}  # those of them that are linear
        self._inputs: dict[int, list[Tensor]] | None = None  # of their convolutions, while these are all that is wanted
        self._call: AttentionCall | None = None  # with all tokens' rows
        self._out: Tensor | None = None
        self._again = False
        self._tokens, self._start, self._stop = 0, 0, 0

    def __call__(self, call: Call) -> Tensor:
        """Keep what a chunk brings, or return its share of the output."""
        if self._inputs is not None:
            return self._take_input(self._inputs, call)
        if call.layer in self._linear:
            out = self._linear[call.layer](call, self._start)
        elif self._again:
            assert self._out is not None
            out = call.share(self._out, self._start, self._stop)
        else:
            assert isinstance(call, AttentionCall)
            self._collect(call)
            out = call.blank()
        if not self._again and call.ends and call.layer == self._mixers[-1]:
            raise _Collected
        return out

    def run(
        self, forward: Callable[..., Any], hidden_BSE: Tensor, given: dict[str, Any], mixers: tuple[int, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        """Run one layer, whose mixers have these numbers; its output takes the place of its input, so that there is one
        residual stream only. Returns it as the layer does: some wrap it in a tuple.

        Raises Finished instead of running the rest of a last layer of which nobody wants more.
        """
        self._tokens, self._mixers, self._again = hidden_BSE.shape[1], mixers, False
        whole = list(cut(self._tokens, self.chunk))
        self._linear = {n: self._attention.chunks(n) for n in mixers if isinstance(self._kinds[n], Linear)}
        for number, chunks in self._linear.items():
            self._inputs = {number: []}
            self._each(forward, hidden_BSE, given, chunks.wanted)
            chunks.exchange(self._inputs[number], number)
        self._inputs = None
        if mixers:
            self._each(forward, hidden_BSE, given, whole)
        for number in mixers:
            self._mix(number)
        if mixers and mixers[-1] == self._last:
            raise Finished
        self._again, beside = True, None
        for hidden, options in self._cuts(hidden_BSE, given, whole):
            out = forward(hidden, **options)
            beside = out[1:] if isinstance(out, tuple) else None
            out = out[0] if isinstance(out, tuple) else out
            if not isinstance(out, Tensor) or any(x is not None for x in beside or ()):
                raise _unfit(f"a layer returns {type(out).__name__}")
            hidden.copy_(out)
        self._out = self._call = None
        return hidden_BSE if beside is None else (hidden_BSE, *beside)

    def _each(
        self, forward: Callable[..., Any], hidden_BSE: Tensor, given: dict[str, Any], rows: list[Interval]
    ) -> None:
        """Run these rows as far as their mixers."""
        for hidden, options in self._cuts(hidden_BSE, given, rows):
            with contextlib.suppress(_Collected):
                forward(hidden, **options)

    def _take_input(self, inputs: dict[int, list[Tensor]], call: Call) -> Tensor:
        if call.layer not in inputs:
            return call.blank()
        assert isinstance(call, ConvCall)
        inputs[call.layer].append(call.x_BCS.clone())
        raise _Collected

    def _mix(self, number: int) -> None:
        """Let one mixer see what all chunks brought."""
        if number in self._linear:
            self._linear[number].settle(number)
            self._attention.finished(number)
            return
        call = self._call
        assert call is not None and call.layer == number
        if number in self._reads:
            self._held[number] = call.k_BKSD.clone(), call.v_BKSE.clone()
        self._out = self._attention(call)

    def _collect(self, call: AttentionCall) -> None:
        # A reader's keys and values are the last chunk's: all of them were kept when their own layer ran.
        held = self._held.get(reads) if (reads := self._reads[call.layer]) is not None else None
        given = [call.q_BHSD] if held is not None else [call.q_BHSD, call.k_BKSD, call.v_BKSE]
        parts = [x.transpose(1, 2) for x in given]
        if call.projections is not None:
            parts += [call.projections.q_BSP, call.projections.k_BSP, call.projections.v_BSP]
        sizes = tuple(x.shape[2:] for x in parts)
        if sizes not in self._whole:
            self._whole[sizes] = [x.new_empty(x.shape[0], self._tokens, *x.shape[2:]) for x in parts]
        for whole, part in zip(self._whole[sizes], parts, strict=True):
            whole[:, self._start : self._stop] = part
        q, *kv = (x.transpose(1, 2) for x in self._whole[sizes][: len(given)])
        k, v = kv if held is None else held
        raw = Projections(*self._whole[sizes][len(given) :]) if call.projections is not None else None
        self._call = dataclasses.replace(call, q_BHSD=q, k_BKSD=k, v_BKSE=v, projections=raw)

    def _cuts(
        self, hidden_BSE: Tensor, given: dict[str, Any], rows: list[Interval]
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for start, stop in rows:
            self._start, self._stop = start, stop
            options = {name: self._cut(name, value) for name, value in given.items()}
            at_S = active_positions()
            assert at_S is not None
            with placed(at_S[start:stop]):
                yield hidden_BSE[:, start:stop], options

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


def chunkable(layer: nn.Module, mixers: tuple[int, ...]) -> None:
    """Let a decoder layer, whose mixers have these numbers, run over chunks when what it is handed asks for it."""
    forward = layer.forward
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def run(*args: Any, **keywords: Any) -> Any:
        attention = keywords.get(KEYWORD)
        if not isinstance(attention, InChunks):
            return forward(*args, **keywords)
        given = dict(zip(names, args, strict=False)) | keywords
        return attention.run(forward, given.pop(names[0]), given, mixers)

    layer.forward = run


def _unfit(why: str) -> UserError:
    return UserError(
        f"this model's layers cannot run in chunks: {why}",
        given="chunk_tokens",
        allowed=f"layers that take {', '.join(_BY_TOKEN)} for each token and return one tensor",
        remedy="Set chunk_tokens=null.",
    )
