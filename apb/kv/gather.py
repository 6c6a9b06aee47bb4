"""Merging a sharded cache on one host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apb.kv.cache import HostCache, Tail
from apb.kv.layer import LayerKV
from apb.plan.shapes import ModelShape
from burst.transport import Message, Transport


def gather(cache: HostCache, rank: int, transport: Transport, shape: ModelShape, like: Tensor) -> HostCache:
    """Return the cache whose only member is ``rank``; every host calls this, the given cache stays as it is.

    K and V of a layer travel together, (2, B, K, T, D) from each member, the owner's tail after its block. ``like``
    gives device and type of the KV.
    """
    context, tail = [], Tail(shape.layers)
    tail_len = cache.length - cache.context_len
    for layer in range(shape.layers):
        parts = []
        for member, block_len in zip(cache.members, cache.block_lens, strict=True):
            held = cache.context[layer] if cache.context else None
            parts.append(_move(held, block_len, member, rank, transport, shape, like, f"layer {layer}: gather"))
        late = None
        if tail_len:  # an unconditioned cache has none
            held = cache.tail.view(layer)
            late = _move(held, tail_len, cache.owner, rank, transport, shape, like, f"layer {layer}: gather")
        if transport.rank == rank:
            k_and_v = _in_order(parts, cache.spans)
            context.append(LayerKV(k_and_v[0], k_and_v[1]))
            if late is not None:
                tail.append(layer, late[0], late[1])
    logits = cache.logits
    if cache.undecoded is None and tail_len and rank != cache.owner:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        logits = _send(logits, (shape.vocab,), wide, cache.owner, rank, transport, "gather the logits")
    return HostCache(
        context=context,
        members=(rank,),
        spans=(((0, cache.context_len),),),
        tail=tail,
        length=cache.length,
        logits=logits if transport.rank == rank else None,
        undecoded=cache.undecoded,
        rope_length=cache.rope_length,
    )


def _in_order(parts: Sequence[Tensor], spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Put the members' rows, (2, B, K, T, D) each, into position order."""
    stretches: dict[int, Tensor] = {}
    for part, held in zip(parts, spans, strict=True):
        sizes = [stop - start for start, stop in held]
        stretches |= {start: rows for (start, _), rows in zip(held, part.split(sizes, dim=3), strict=True)}
    return torch.cat([stretches[start] for start in sorted(stretches)], dim=3)


def _move(
    held: LayerKV | None,
    tokens: int,
    src: int,
    dst: int,
    transport: Transport,
    shape: ModelShape,
    like: Tensor,
    step: str,
) -> Tensor:
    """Bring one member's part of one layer to ``dst``; elsewhere the result means nothing."""
    packed = None
    if held is not None and transport.rank == src:
        packed = torch.stack([held.k_BKTD, held.v_BKTD])
    size = (2, 1, shape.kv_heads, tokens, shape.head_dim)
    return _send(packed, size, like.dtype, src, dst, transport, step)


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
