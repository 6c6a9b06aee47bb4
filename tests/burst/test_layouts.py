"""Layouts and masks as data, against the dense mask over the whole sequence.

Shapes: N tokens of the sequence, S rows of a rank, T keys of a rank.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burst.errors import UserError
from burst.layouts.layout import NAMES, Layout, layout
from burst.layouts.masks import MaskPiece

PACKED = [[0, 7, 14, 16], [0, 120, 1248, 4232], [0, 5, 5, 9, 40], [0, 0, 3]]


def dense_mask(lay: Layout, causal: bool, window: int | None) -> Tensor:
    """Who may see whom, bool (N, N), from positions and documents alone."""
    n = lay.cu_seqlens[-1]
    at_N = torch.arange(n)
    document_N = torch.bucketize(at_N, torch.tensor(lay.cu_seqlens[1:]), right=True)
    mask_NN = document_N[:, None] == document_N
    if causal:
        mask_NN &= at_N[:, None] >= at_N
    if window is not None:
        mask_NN &= (at_N[:, None] - at_N).abs() < window
    return mask_NN


def piece_mask(piece: MaskPiece) -> Tensor:
    """What a kernel computes for a piece, int (S, T)."""
    mask_ST = torch.ones(piece.q_stop - piece.q_start, piece.k_stop - piece.k_start, dtype=torch.int8)
    if piece.causal:
        assert mask_ST.shape[0] == mask_ST.shape[1], piece
        mask_ST = mask_ST.triu() if piece.flip else mask_ST.tril()
    assert mask_ST.numel() and int(mask_ST.sum(dtype=torch.int64)) == piece.pairs
    assert piece.causal or not piece.flip
    return mask_ST


def counted(queries: Layout, keys: Layout, causal: bool, window: int | None) -> Tensor:
    """How often each pair is computed by all pieces together, int (N, N)."""
    n = keys.cu_seqlens[-1]
    seen_NN = torch.zeros(n, n, dtype=torch.int8)
    for q_rank in range(queries.world):
        q_at, q_count = queries.positions(q_rank), queries.counts[q_rank]
        for kv_rank in range(keys.world):
            k_at, k_count = keys.positions(kv_rank), keys.counts[kv_rank]
            for p in queries.pieces(q_rank, kv_rank, causal=causal, window=window, keys=keys):
                assert 0 <= p.q_start < p.q_stop <= q_count and 0 <= p.k_start < p.k_stop <= k_count
                seen_NN[q_at[p.q, None], k_at[p.k]] += piece_mask(p)
    return seen_NN


names = st.sampled_from(NAMES)
windows = st.one_of(st.none(), st.integers(1, 60))


@settings(max_examples=150, deadline=None)
@given(
    names,
    st.integers(0, 60),
    st.integers(1, 9),
    st.booleans(),
    windows,
    st.lists(st.integers(0, 60), max_size=4),
)
def test_pieces_cover_the_mask_exactly_once(
    name: str, n: int, world: int, causal: bool, window: int | None, cuts: list[int]
) -> None:
    lay = layout(name, n, world, [0, *sorted(min(c, n) for c in cuts), n])
    assert torch.equal(counted(lay, lay, causal, window), dense_mask(lay, causal, window).to(torch.int8))


@pytest.mark.parametrize("edges", PACKED, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_packed_documents(name: str, edges: list[int]) -> None:
    for causal, window in ((True, None), (True, 100), (False, 64)):
        lay = layout(name, edges[-1], 8, edges)
        assert torch.equal(counted(lay, lay, causal, window), dense_mask(lay, causal, window).to(torch.int8))


@settings(max_examples=80, deadline=None)
@given(names, st.integers(0, 40), st.integers(1, 20), st.integers(1, 6), st.booleans(), windows)
def test_chunks_over_history(name: str, old: int, new: int, world: int, causal: bool, window: int | None) -> None:
    queries, keys = layout(name, old, world).extend(new)
    later, all_keys = keys.extend(3)
    seen_NN = counted(queries, keys, causal, window)
    expected_NN = dense_mask(keys, causal, window).to(torch.int8)
    assert torch.equal(seen_NN[old:], expected_NN[old:]) and not seen_NN[:old].any()
    assert later.base == old + new and sum(all_keys.counts) == old + new + 3


@settings(max_examples=80, deadline=None)
@given(names, st.integers(0, 70), st.integers(1, 9), st.lists(st.integers(0, 70), max_size=3))
def test_shard_and_unshard_are_inverse(name: str, n: int, world: int, cuts: list[int]) -> None:
    lay = layout(name, n, world, [0, *sorted(min(c, n) for c in cuts), n])
    x = torch.arange(2 * n).view(2, n)
    parts = [lay.shard(x, r, dim=1) for r in range(world)]
    assert torch.equal(lay.unshard(parts, dim=1), x)
    for r, part in enumerate(parts):
        at_S = lay.positions(r)
        assert at_S.dtype == torch.int64 and torch.equal(part[0], at_S) and len(at_S) == lay.counts[r]
        assert torch.equal(lay.rows(r, at_S), torch.arange(len(at_S)))
        starts = [lay.cu_seqlens[span.document] for span in lay.spans[r] for _ in range(span.count)]
        assert (at_S - lay.document_positions(r)).tolist() == starts
    assert max(lay.counts) - min(lay.counts) <= (2 if name == "zigzag" else 1)


@settings(max_examples=60, deadline=None)
@given(names, st.integers(0, 70), st.sampled_from([(1, 4), (4, 1), (2, 3), (3, 2)]), st.booleans(), windows)
def test_grouped_ranks_hold_their_members_tokens(
    name: str, n: int, shape: tuple[int, int], causal: bool, window: int | None
) -> None:
    groups, members = shape
    lay = layout(name, n, groups * members)
    ranks = [range(g * members, (g + 1) * members) for g in range(groups)]
    whole = lay.grouped(ranks)
    for g, group in enumerate(ranks):
        together = torch.cat([lay.positions(r) for r in group]).sort().values
        assert torch.equal(whole.positions(g).sort().values, together)
    assert torch.equal(counted(whole, whole, causal, window), dense_mask(lay, causal, window).to(torch.int8))


def test_regular_masks_are_few_large_pieces() -> None:
    square = MaskPiece(0, 16, 0, 16, causal=True)
    zigzag = layout("zigzag", 64, 4)
    assert zigzag.pieces(1, 1) == (square,)
    assert zigzag.pieces(2, 1) == (MaskPiece(0, 16, 0, 8),)  # an earlier source: all queries, its first chunk
    assert zigzag.pieces(1, 2) == (MaskPiece(8, 16, 0, 16),)  # a later one: the second chunk, all keys
    striped = layout("striped", 64, 4)
    assert striped.pieces(2, 1) == (square,)
    assert striped.pieces(1, 2) == (MaskPiece(1, 16, 0, 15, causal=True),)
    contiguous = layout("contiguous", 64, 4)
    assert contiguous.pieces(1, 2) == () and contiguous.pieces(2, 1) == (MaskPiece(0, 16, 0, 16),)
    assert contiguous.pieces(1, 0, window=16) == (MaskPiece(0, 15, 1, 16, causal=True, flip=True),)
    assert layout("zigzag", 64, 4).grouped([range(4)]).pieces(0, 0) == (MaskPiece(0, 64, 0, 64, causal=True),)


@pytest.mark.parametrize(("n", "world"), [(64, 4), (1024, 8), (2999, 8), (4096, 16)])
def test_balance_under_a_causal_mask(n: int, world: int) -> None:
    area = {name: [layout(name, n, world).pairs(r) for r in range(world)] for name in NAMES}
    assert all(sum(pairs) == n * (n + 1) // 2 for pairs in area.values())
    if n % (2 * world) == 0:
        assert max(area["zigzag"]) == min(area["zigzag"])
    assert n < world**2 or max(area["striped"]) / min(area["striped"]) <= 1 + 2 * world / n
    ideal = n * (n + 1) / 2 / world
    assert max(area["contiguous"]) / ideal == pytest.approx(2 * world / (world + 1), rel=0.15)


def test_a_large_layout_is_cheap() -> None:
    lay = layout("zigzag", 2**20, 64, list(range(0, 2**20 + 1, 2**12)))
    assert sum(len(lay.pieces(0, s)) for s in range(64)) <= 2 * 256 * 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("zigzog", 8, 2), "Did you mean zigzag"),
        (("zigzag", 8, 0), "1 rank or more"),
        (("zigzag", -1, 2), "0 tokens or more"),
        (("zigzag", 8, 2, [0, 5]), "8 last"),
        (("zigzag", 8, 2, [0, 5, 3, 8]), "never falling"),
        (("zigzag", 8, 2, [1, 8]), "0 first"),
    ],
)
def test_mistakes_are_named(arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        layout(*arguments)


def test_wrong_sizes_are_named() -> None:
    lay = layout("zigzag", 10, 2)
    with pytest.raises(UserError, match="given: 9; allowed: 10"):
        lay.shard(torch.zeros(9), 0, 0)
    with pytest.raises(UserError, match="rank 1's tokens"):
        lay.unshard([torch.zeros(5), torch.zeros(4)], 0)
    with pytest.raises(UserError, match="one part a rank"):
        lay.unshard([torch.zeros(5)], 0)
    with pytest.raises(UserError, match="2 documents"):
        layout("zigzag", 4, 2, [0, 2, 4]).extend(2)
    with pytest.raises(UserError, match="striped after zigzag"):
        lay.extend(4, "striped")
