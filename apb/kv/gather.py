"""Merging a sharded cache on one host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from apb.kv.cache import HostCache
from apb.layers.base import LayerCache, ShardedCache
from apb.layers.rows import LayerKV
from apb.plan.shapes import ModelShape
from burst.transport import Message, Transport


def gather(cache: HostCache, rank: int, transport: Transport, shape: ModelShape, like: Tensor) -> HostCache:
    """Return the cache whose only member is ``rank``; every host calls this, the given cache stays as it is.

    Sharded layers' rows travel, K and V of a token side by side, (B, K, T, D + E) from each member, the owner's tail
    after its block; the other layers are there already, so ``rank`` must be a member where there are some. ``like``
    gives device and type of the rows.
    """
    layers: list[LayerCache] = []
    here = transport.rank == rank
    for number, kind in enumerate(shape.mixers):
        reads = None if kind.reads is None or not here else layers[kind.reads]
        held = cache.layers[number] if cache.layers else None
        if not kind.sharded:
            assert held is not None or not here, "only members keep layers that are not sharded"
            layers += [held.fork(reads)] if held is not None and here else []
            continue
        made = kind.cache(reads) if here else None
        if kind.reads is None:
            sizes = kind.attention_shape(like.element_size())
            moving = _Moving(transport, rank, like, sizes.kv_heads, sizes.row_widths, f"layer {number}")
            _gather_layer(cache, cast("ShardedCache | None", held), cast("ShardedCache | None", made), moving)
        layers += [made] if made is not None else []
    logits = cache.logits
    if cache.undecoded is None and cache.tail_len and rank != cache.owner:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        logits = _send(logits, (shape.vocab,), wide, cache.owner, rank, transport, "gather the logits")
    return HostCache(
        mixers=cache.mixers,
        layers=layers,
        members=(rank,),
        spans=(((0, cache.context_len),),),
        length=cache.length,
        logits=logits if here else None,
        undecoded=cache.undecoded,
        rope_length=cache.rope_length,
    )


@dataclass(frozen=True)
class _Moving:
    """One layer's way to its new host: rows of ``heads`` keys and values of these ``widths``."""

    transport: Transport
    dst: int
    like: Tensor
    heads: int
    widths: tuple[int, int]
    layer: str

    def rows(self, held: LayerKV | None, tokens: int, src: int) -> Tensor:
        """Bring one member's rows, (1, K, T, D + E), to the new host; elsewhere the result means nothing."""
        packed = None
        if held is not None and self.transport.rank == src:
            packed = torch.cat([held.k_BKTD, held.v_BKTE], dim=-1)
        size = (1, self.heads, tokens, sum(self.widths))
        return _send(packed, size, self.like.dtype, src, self.dst, self.transport, f"{self.layer}: gather")

    def split(self, rows_BKTX: Tensor) -> LayerKV:
        """Return keys and values of such rows, each in memory of its own."""
        return LayerKV(*(x.contiguous() for x in rows_BKTX.split(list(self.widths), dim=-1)))


def _gather_layer(cache: HostCache, held: ShardedCache | None, made: ShardedCache | None, moving: _Moving) -> None:
    parts = []
    for member, block_len in zip(cache.members, cache.block_lens, strict=True):
        parts.append(moving.rows(held.context if held is not None else None, block_len, member))
    late = None
    if cache.tail_len:  # an unconditioned cache has none
        late = moving.rows(held.tail if held is not None else None, cache.tail_len, cache.owner)
    if made is not None:
        made.fill(moving.split(_in_order(parts, cache.spans)))
        if late is not None:
            made.append(moving.split(late))


def _in_order(parts: Sequence[Tensor], spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Put the members' rows, (B, K, T, X) each, into position order."""
    stretches: dict[int, Tensor] = {}
    for part, held in zip(parts, spans, strict=True):
        sizes = [stop - start for start, stop in held]
        stretches |= {start: rows for (start, _), rows in zip(held, part.split(sizes, dim=2), strict=True)}
    return torch.cat([stretches[start] for start in sorted(stretches)], dim=2)


def _send(
    x: Tensor | None, size: tuple[int, ...], dtype: torch.dtype, src: int, dst: int, transport: Transport, step: str
) -> Tensor:
    if transport.rank not in (src, dst) or (x is None and src == dst):
        return torch.empty(0)
    if src == dst:
        assert x is not None
        return x
    if transport.rank == src:
        assert x is not None
        transport.exchange([Message(dst, x)], [], kind="gather", step=step).wait()
        return x
    buffer = torch.empty(size, dtype=dtype, device=transport.device)
    transport.exchange([], [Message(src, buffer)], kind="gather", step=step).wait()
    return buffer
