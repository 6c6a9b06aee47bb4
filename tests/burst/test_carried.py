"""Keys and values that travel narrower than attention sees them: expanded where they arrive, exact, bytes as counted.

Shapes: H query heads, N tokens, S own tokens, D head dim, E value dim, R width of what travels as keys, P as values.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burst.execution.blocks import Blocks, Expand
from burst.execution.buffers import Form
from burst.execution.execute import Execution
from burst.kernels import kernel
from burst.layouts.layout import Layout, layout
from burst.layouts.masks import MaskPiece
from burst.schedules import NAMES, schedule
from burst.transport import Transport, VirtualWorld
from tests.support.attention_cases import LAYOUTS

HEADS, D, E, R, P = 6, 7, 4, 5, 3
SCALE = 0.3


@functools.cache
def drawn(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(n)
    shapes = [(1, HEADS, n, D), (1, 1, n, R), (1, 1, n, P), (HEADS, R + P, D + E)]
    q, k, v, up = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
    return q, k, v, up


def expander(up: Tensor, heads: slice) -> Expand:
    def expand(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.cat([k, v], dim=3) @ up[heads]
        return made[..., :D], made[..., D:]

    return expand


def dense(n: int, window: int | None) -> Tensor:
    q, k, v, up = drawn(n)
    k, v = expander(up, slice(None))(k, v)
    gap = torch.arange(n)[:, None] - torch.arange(n)[None]
    unseen = (gap < 0) | (gap >= (window or n))
    return (q @ k.mT * SCALE).masked_fill(unseen, -torch.inf).softmax(-1) @ v


def run(
    name: str, where: Layout, nodes: tuple[int, ...], at_once: int, travels: str, window: int | None, kind: str
) -> tuple[Tensor, VirtualWorld]:
    q, k, v, up = drawn(where.n_tokens)
    form = Form(1, HEADS, 1, D, E, q.dtype, carried=(R, P))
    made = schedule(name, where, form.shape(), nodes=nodes, travels=travels, window=window)

    def rank(t: Transport) -> Tensor:
        heads = made.heads_of(t.rank)
        own = slice(None) if heads is None else slice(heads.q_start, heads.q_stop)
        blocks = Blocks(kernel(kind), SCALE, expand=expander(up, own), at_once=at_once)
        t.open(made.channels)
        rows = {name: where.shard(x, t.rank, 2) for name, x in (("q", q), ("k", k), ("v", v))}
        return Execution(made, t, blocks, form, rows).forward()[0]

    world = VirtualWorld(where.world, nodes=nodes)
    parts = world.run(rank)
    for t in world.transports:
        sent: Counter[tuple[str, str]] = Counter(made.bytes_sent(t.rank, form.shape()))
        assert {key: n for key, n in t.ledger.entries().items() if n} == {key: n for key, n in sent.items() if n}
    return where.unshard(parts, 2), world


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_what_is_expanded_where_it_arrives_is_exact(name: str, world: int) -> None:
    nodes = tuple(r * 2 // world for r in range(world)) if world in (4, 8) else (0,) * world
    for kind in LAYOUTS:
        for n, at_once, kernel_name in ((2 * world + 1, 1, "cpu"), (61, 7, "cpu"), (61, 4096, "reference")):
            got, _ = run(name, layout(kind, n, world), nodes, at_once, "kv", None, kernel_name)
            assert (got - dense(n, None)).abs().max() < 1e-13, (kind, n)


@pytest.mark.parametrize("name", ["ring", "burst"])
def test_queries_may_travel_instead_and_windows_hold(name: str) -> None:
    for kind in LAYOUTS:
        for travels, window in (("q", None), ("q", 9), ("kv", 9), ("kv", 2)):
            got, _ = run(name, layout(kind, 50, 3), (0, 0, 0), 4, travels, window, "cpu")
            assert (got - dense(50, window)).abs().max() < 1e-13, (kind, travels, window)


def test_what_travels_is_narrow() -> None:
    where = layout("contiguous", 64, 4)
    _, world = run("ring", where, (0,) * 4, 16, "kv", None, "cpu")
    booked = [sum(n for key, n in t.ledger.entries().items() if key[0] == "kv") for t in world.transports]
    assert booked == [16 * (R + P) * 8 * passed for passed in (1, 2, 3, 0)]
    _, world = run("ulysses", where, (0,) * 4, 16, "kv", None, "cpu")
    booked = [sum(n for key, n in t.ledger.entries().items() if key[0] == "qkv") for t in world.transports]
    heads = (1, 2, 1, 2)  # of four members; each gets the whole rows beside its own heads
    assert booked == [16 * 8 * ((HEADS - own) * D + 3 * (R + P)) for own in heads]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    at=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    kind=st.sampled_from(["full", "causal", "flip"]),
    step=st.integers(1, 12),
)
def test_parts_of_a_piece_cover_it_once(rows: int, columns: int, at: tuple[int, int], kind: str, step: int) -> None:
    columns = columns if kind == "full" else rows
    piece = MaskPiece(at[0], at[0] + rows, at[1], at[1] + columns, causal=kind != "full", flip=kind == "flip")
    found: Counter[tuple[int, int]] = Counter()
    for start in range(0, 20, step):
        for part in piece.over(start, start + step):
            assert not part.causal or part.q_stop - part.q_start == part.k_stop - part.k_start
            found.update((i, j + start) for i, j in cells(part))
    assert found == Counter(cells(piece))


def cells(piece: MaskPiece) -> list[tuple[int, int]]:
    out = []
    for i in range(piece.q_stop - piece.q_start):
        for j in range(piece.k_stop - piece.k_start):
            if not piece.causal or (j >= i if piece.flip else j <= i):
                out.append((piece.q_start + i, piece.k_start + j))
    return out
