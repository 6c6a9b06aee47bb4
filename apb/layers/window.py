"""Windows: a token sees its last W keys (sliding), or those of its own chunk of C (chunked); exact over hosts by halos.

A stretch gets the rows before it that its first tokens see straight from their owners, and every host the last rows of
the context: new tokens then send nothing.

Shapes: B batch (1), H query heads, K kv heads, S tokens of a segment here, T keys, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from apb.layers.base import LAYERS, LayerCache, Place, Step
from apb.layers.call import AttentionCall, Call
from apb.layers.halo import Reach, exchanged, needed, traffic
from apb.layers.partials import finish
from apb.layers.rows import LayerKV, Rows, picked, side_by_side
from apb.layers.sharding import Interval, Segment, Sharding, common, union, without
from apb.layers.softmax import Softmax
from burst.execution.blocks import Blocks, begin
from burst.kernels.merge import Accumulator
from burst.kernels.reference import attend
from burst.layouts.masks import MaskPiece, Span, pieces

TILE = 2048  # tokens that are attended to at once during a prefill


@LAYERS.register("window", "causal attention over the last tokens, or within chunks")
@dataclass(frozen=True)
class Window(Softmax):
    """Causal attention over ``window`` keys, the token's own included; ``chunked``: over the token's own chunk of so
    many."""

    sharded: ClassVar[bool] = False

    window: int = 0
    chunked: bool = False

    @property
    def back(self) -> Reach:
        """Distance that a token sees back."""
        return Reach(self.window, self.chunked)

    def reach(self, position: int) -> int:
        return self.back(position)

    def messages(self, sharding: Sharding, rank: int, e: int, kept: bool = True) -> dict[str, dict[int, int]]:
        """The halo; a layer that reads another's has its rows already."""
        if self.reads is not None:
            return {"halo": {}}
        sends, row = traffic(self.back, sharding, kept)[rank], self.row_bytes(e)
        return {"halo": {peer: sum(stop - start for start, stop in parts) * row for peer, parts in sends}}

    @property
    def width(self) -> int:
        return self.window

    def flops(self, sharding: Sharding, rank: int) -> int:
        pairs = sum(self._pairs(stop) - self._pairs(start) for start, stop in sharding.spans[rank])
        return self.pair_flops * self.q_heads * pairs

    def _pairs(self, end: int) -> int:
        """Query-key pairs of all tokens before position ``end``."""
        full, rest = divmod(end, self.window) if self.chunked else (0, end)
        if self.chunked:
            return full * (self.window * (self.window + 1) // 2) + rest * (rest + 1) // 2
        short = min(end, self.window)
        return short * (short + 1) // 2 + (end - short) * self.window

    def row_work_bytes(self, e: int) -> int:
        """q, k and v before and after RoPE, and queries in fp32 where they are normalised; outputs take the place of
        queries that are as wide."""
        given = self.q_heads * self.qk_dim + self.kv_dim
        return (2 * given + self._apart) * e + self.q_heads * self.qk_dim * 4

    def whole_row_bytes(self, e: int, exact: bool) -> int:
        return (self.q_heads * self.qk_dim + self.kv_dim + self._apart) * e

    @property
    def _apart(self) -> int:
        """Numbers of a token's output that have memory of their own."""
        return 0 if self.v_dim == self.qk_dim else self.q_heads * self.v_dim

    def workspace(self, sharding: Sharding, rank: int, e: int, together: int) -> int:
        """Halos arriving, and beside their keys; of the tokens attended to at once, two partial outputs in fp32, and
        queries, keys and values read backwards."""
        wanted = without(needed(self.back, sharding, rank, kept=True), list(sharding.spans[rank]))
        tile = min(sharding.tokens(rank), TILE)
        keys = 2 * sum(stop - start for start, stop in wanted) + tile + min(sharding.tokens(rank), self.window)
        return keys * self.row_bytes(e) + tile * self.q_heads * (2 * self.v_dim * max(4, e) + self.qk_dim * e)

    def held_bytes(self, context: int, e: int) -> int:
        return (context - self.reach(context)) * self.row_bytes(e) if self.reads is None else 0

    def tail_bytes(self, tokens: int, e: int, owner: bool) -> int:
        return tokens * self.row_bytes(e) if self.reads is None else 0

    def step_flops(self, tokens: int, context: int, rank_tokens: int, owner: bool) -> int:
        return self.pair_flops * self.q_heads * (self._pairs(context + tokens) - self._pairs(context))

    def prefill(self, segments: Sequence[Segment], place: Place, reads: LayerCache | None = None) -> WindowPrefill:
        assert reads is None or isinstance(reads, WindowCache)
        return WindowPrefill(self, segments, place, reads)

    def attend(
        self, call: AttentionCall, at: Sequence[Interval], keys: LayerKV, keys_at: Sequence[Interval], place: Place
    ) -> Tensor:
        """Attend the call's queries at the positions ``at`` to keys at ``keys_at``; returns (B, S, H, E)."""
        mask = _mask(self.back, tuple(at), tuple(keys_at))
        total = Accumulator()
        Blocks(self.kernel(place.kernel), call.scale).forward(total, call.q_BHSD, keys.k_BKTD, keys.v_BKTE, mask)
        begin(total, call.q_BHSD, call.v_BKSE.shape[3])
        return finish(total, call.q_BHSD.dtype, call.sinks_H)


@lru_cache(maxsize=1024)
def _mask(back: Reach, at: tuple[Interval, ...], keys_at: tuple[Interval, ...]) -> tuple[MaskPiece, ...]:
    """Return the mask of queries at some positions over keys at others; all layers of a prefill ask for the same."""
    return pieces(_spans(back, at), _spans(back, keys_at), causal=True, window=None if back.chunked else back.window)


def _spans(back: Reach, intervals: Sequence[Interval]) -> Iterator[Span]:
    """Yield rows side by side at these positions as burst's spans; a chunk is a document."""
    offset = 0
    for start, stop in intervals:
        while start < stop:
            edge = min(stop, back(start) + back.window) if back.chunked else stop
            yield Span(start, edge - start, 1, start // back.window if back.chunked else 0, offset)
            offset += edge - start
            start = edge


class WindowPrefill:
    """The run of one window layer during a prefill; see ``LayerPrefill``."""

    def __init__(
        self, kind: Window, segments: Sequence[Segment], place: Place, reads: WindowCache | None = None
    ) -> None:
        self.kind, self._segments, self._place = kind, segments, place
        self._reads, self.cache = reads, WindowCache(kind, reads)
        if reads is not None:
            reads.readers += 1

    def __call__(self, call: Call) -> Tensor:
        """Exchange halos and attend, segment by segment; returns (B, S, H, E)."""
        assert isinstance(call, AttentionCall)
        # The output takes the place of its queries, part by part: only one part's partial results exist at a time.
        same = self.kind.v_dim == self.kind.qk_dim
        out_BHSE = call.q_BHSD if same else call.blank().transpose(1, 2)
        for number, segment in enumerate(self._segments):
            mine = slice(segment.start, segment.stop)
            self._run(number, segment, call.rows(segment.start, segment.stop), out_BHSE[:, :, mine])
        source = self._reads or self.cache
        source.readers -= self._reads is not None
        if not source.readers:
            source.halos.clear()
        return out_BHSE.transpose(1, 2)

    def _run(self, number: int, segment: Segment, call: AttentionCall, out_BHSE: Tensor) -> None:
        rank, sharding, kind = self._place.transport.rank, segment.sharding, self.kind
        held = sharding.spans[rank]
        here: list[tuple[LayerKV, Sequence[Interval]]] = [(LayerKV(call.k_BKSD, call.v_BKSE), held)]
        if self._reads is None:
            self.cache.halos.append(self._exchange(segment, here[0][0], call.layer))
        arrived, wanted = (self._reads or self.cache).halos[number]
        if arrived is not None:
            here.append((arrived, wanted))
        for low, high in held:
            for start in range(low, high, TILE):
                part = start, min(start + TILE, high)
                rows, seen = sharding.rows(rank, part), (kind.reach(start), part[1])
                out = kind.attend(call.rows(*rows), [part], picked(here, seen), [seen], self._place)
                out_BHSE[:, :, slice(*rows)] = out.transpose(1, 2)
        if segment.kept:
            n = sharding.length
            end = (kind.reach(n), n)
            self.cache.fill(picked(here, end), end)

    def _exchange(self, segment: Segment, own: LayerKV, layer: int) -> tuple[LayerKV | None, list[Interval]]:
        """Send the rows that others need, and return those that arrive here, with their positions."""
        t, sharding = self._place.transport, segment.sharding
        sends, wide = traffic(self.kind.back, sharding, segment.kept), own.k_BKTD.shape[3]
        parts = union([part for _, sent in sends[t.rank] for part in sent])
        here = [part for span in sharding.spans[t.rank] for part in common([span], parts)]
        have = [(part, _packed(own.rows(*sharding.rows(t.rank, part)))) for part in here]
        found = exchanged(sends, have, _packed(own.rows(0, 0)), 2, t, "halo", f"layer {layer}: halo")
        if not found:
            return None, []
        both = torch.cat([rows for _, rows in found], dim=2)
        return LayerKV(both[..., :wide], both[..., wide:]), [part for part, _ in found]


def _packed(kv: LayerKV) -> Tensor:
    """Put keys and values side by side, (B, K, T, D + E)."""
    return torch.cat([kv.k_BKTD, kv.v_BKTE], dim=-1)


class WindowCache:
    """The last rows of the context and all rows after it, on every host; a cache that ``reads`` another has none."""

    def __init__(self, kind: Window, reads: WindowCache | None = None) -> None:
        self.kind, self._reads = kind, reads
        self._context: LayerKV | None = None
        self._at: Interval = (0, 0)  # positions of the context's rows that are kept
        self._tail = Rows()
        # Of a prefill: rows that arrived for each segment, with their positions, and the layers that will read them.
        self.halos: list[tuple[LayerKV | None, list[Interval]]] = []
        self.readers = 0

    def fill(self, context: LayerKV, at: Interval) -> None:
        """Keep the context's last rows."""
        if self._reads is None:
            self._context, self._at = context.clone(), at

    def attend(self, call: Call, step: Step) -> Tensor:
        """Attend new tokens to the rows in their window; returns (B, S, H, E)."""
        assert isinstance(call, AttentionCall)
        start = step.start
        kept, at = self._visible(start)
        keys = side_by_side([*kept, LayerKV(call.k_BKSD, call.v_BKSE)])
        if step.parents is None:
            new = (start, start + step.tokens)
            out = self.kind.attend(call, [new], keys, [at, new], step.place)
        else:
            out = self._attend_tree(call, step, keys, at)
        if self._reads is None:
            self._tail.append(call.k_BKSD, call.v_BKSE)
        return out

    def _visible(self, position: int) -> tuple[list[LayerKV], Interval]:
        """Return the kept rows that a token at ``position`` sees, in parts, and where they stand."""
        if self._reads is not None:
            return self._reads._visible(position)
        assert self._context is not None
        first, end = self._at
        low = max(self.kind.reach(position), first)
        parts = [self._context.rows(low - first, end - first)] if low < end else []
        tail = self._tail.view()
        if tail is not None:
            parts.append(tail.rows(max(0, low - end), position - end))
        return parts, (low, position)

    def _attend_tree(self, call: AttentionCall, step: Step, keys: LayerKV, at: Interval) -> Tensor:
        """Attend a draft tree's rows, which stand at their depths, to cached rows and ancestors in their windows."""
        at_M, size = step.positions_M, self.kind.window
        reach_M = at_M // size * size if self.kind.chunked else at_M - size + 1
        cached_T = torch.arange(*at, device=at_M.device)
        seen_MT = torch.cat([cached_T >= reach_M[:, None], step.seen_MM & (at_M >= reach_M[:, None])], dim=1)
        total = Accumulator()
        cap = self.kind.soft_cap
        total.add(*attend(call.q_BHSD, keys.k_BKTD, keys.v_BKTE, False, call.scale, seen_ST=seen_MT, soft_cap=cap))
        return finish(total, call.q_BHSD.dtype, call.sinks_H)

    def keep(self, rows: Sequence[int]) -> None:
        self._tail.keep(rows)

    def restart(self) -> None:
        self._tail.truncate(0)

    def fork(self, reads: LayerCache | None = None) -> WindowCache:
        assert reads is None or isinstance(reads, WindowCache)
        out = WindowCache(self.kind, reads)
        out._context, out._at, out._tail = self._context, self._at, self._tail.copy()
        return out
