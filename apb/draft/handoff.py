"""Hand-over of a prefill to a draft head: its own keys and values, made where the tokens are.

Features never travel. Every host makes the rows of its own tokens; only those inside the head's window, and its sinks,
go to the host that will draft: at most ``window`` + ``sinks`` rows of one layer, however long the context is.

Shapes: K kv heads, T rows, D head dim, W words of a bitmap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apb.draft.cache import DraftCache
from apb.draft.draft import Draft
from apb.draft.vocab import bitmap
from apb.layers.rows import LayerKV
from apb.plan.draft import Spans, positions
from burst.transport import Message, Transport


def hand_over(
    draft: Draft,
    wanted: Sequence[Spans],
    features_SF: Tensor,
    next_ids: Sequence[int],
    block_ids: Sequence[int],
    owner: int,
    transport: Transport,
) -> DraftCache | None:
    """Make this host's rows and give the owner everybody's; every host calls this, the owner gets the cache.

    ``wanted[rank]``: what each host gives. ``features_SF``: this host's, of its wanted positions; ``next_ids``: the
    token after each of them. ``block_ids``: all tokens of this host, whose ids the owner joins with everybody's.
    """
    at, device = positions(wanted[transport.rank]), transport.device
    own = torch.empty(0, device=device)
    if at:
        ids_BS, at_S = torch.tensor([next_ids], device=device), torch.tensor(at, device=device)
        own = torch.stack(draft.head.keys_values(draft.head.fuse(features_SF[None]), ids_BS, at_S))
    bits = None
    if draft.ranked_W is not None:
        bits = bitmap(block_ids, draft.head.target.shape.vocab).to(device)
    step = "hand the draft over"
    if transport.rank != owner:
        sent = [own] if bits is None else [own, bits]
        transport.exchange([Message(owner, x) for x in sent], [], kind="draft", step=step).wait()
        return None
    peers = [rank for rank in range(transport.world) if rank != owner]
    parts = [_room(draft, len(positions(spans)), device) for spans in wanted]
    theirs = [torch.empty_like(bits) for _ in peers] if bits is not None else []
    expected = [Message(rank, parts[rank]) for rank in peers] + list(map(Message, peers, theirs))
    transport.exchange([], expected, kind="draft", step=step).wait()
    parts[owner] = own if at else parts[owner]
    for other in theirs:
        bits = other if bits is None else bits | other
    everywhere = [p for spans in wanted for p in positions(spans)]
    order = sorted(range(len(everywhere)), key=everywhere.__getitem__)
    k_and_v = torch.cat(parts, dim=3).index_select(3, torch.tensor(order, dtype=torch.int64, device=device))
    return DraftCache(draft, LayerKV(k_and_v[0], k_and_v[1]), [everywhere[i] for i in order], len(order), bits)


def move(draft: Draft, cache: DraftCache | None, src: int, dst: int, transport: Transport) -> DraftCache | None:
    """Return a copy of host ``src``'s draft cache on host ``dst``; every host calls this, others get None.

    The last token's feature stays behind: on another host the first step drafts nothing and brings the next one.
    """
    step = "gather the draft"
    if transport.rank == src:
        assert cache is not None
        if src == dst:
            return cache.copy()
        at, rows = cache.positions, cache.rows()
        later = torch.tensor(sorted(cache.later), dtype=torch.int64, device=transport.device)
        sizes = torch.tensor([len(at), cache.context_rows, len(later)], device=transport.device)
        transport.exchange([Message(dst, sizes)], [], kind="gather", step=step).wait()
        if rows is not None:
            own = [torch.tensor(at, device=transport.device), torch.stack([rows.k_BKTD, rows.v_BKTE])]
            transport.exchange([Message(dst, x) for x in own], [], kind="gather", step=step).wait()
        if cache.bits is not None:
            transport.exchange([Message(dst, cache.bits), Message(dst, later)], [], kind="gather", step=step).wait()
    if transport.rank != dst:
        return None
    sizes = torch.empty(3, dtype=torch.int64, device=transport.device)
    transport.exchange([], [Message(src, sizes)], kind="gather", step=step).wait()
    count, context_rows, later_ids = sizes.tolist()
    at_T, k_and_v = sizes.new_empty(count), _room(draft, count, transport.device)
    if count:
        transport.exchange([], [Message(src, at_T), Message(src, k_and_v)], kind="gather", step=step).wait()
    bits, later = None, sizes.new_empty(later_ids)
    if draft.ranked_W is not None:
        bits = torch.empty(-(-draft.head.target.shape.vocab // 8), dtype=torch.uint8, device=transport.device)
        transport.exchange([], [Message(src, bits), Message(src, later)], kind="gather", step=step).wait()
    moved = DraftCache(draft, LayerKV(k_and_v[0], k_and_v[1]), at_T.tolist(), context_rows, bits)
    if bits is not None:
        moved.later.update(later.tolist())
    return moved


def _room(draft: Draft, rows: int, device: torch.device) -> Tensor:
    head = draft.head
    return torch.empty(2, 1, head.kv_heads, rows, head.head_dim, dtype=head.target.dtype, device=device)
