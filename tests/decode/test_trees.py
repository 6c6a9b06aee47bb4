"""Draft trees as data: growing, choosing, building, walking, cutting to what pays."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.decode.stride import Stride, best_size
from apb.decode.tree import ROOT, Pool, Tree, best, build, capacity, expand, rerank, root_only, walk

# Few distinct values, so that equal ones are common.
LEVELS = st.sampled_from([0.0, -0.5, -0.5, -1.0, -2.0, -7.0])


def rows(draw: st.DrawFn, count: int, vocab: int) -> torch.Tensor:
    return torch.tensor(
        draw(st.lists(st.lists(LEVELS, min_size=vocab, max_size=vocab), min_size=count, max_size=count))
    )


@st.composite
def pools(draw: st.DrawFn) -> tuple[Pool, int, int]:
    """A grown pool, its depth and its width."""
    vocab, depth, top_k = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pool = expand(None, rows(draw, 1, vocab), top_k)
    for _ in range(depth - 1):
        pool = expand(pool, rows(draw, len(pool.frontier), vocab), top_k)
    return pool, depth, top_k


@given(st.data())
def test_best_is_a_stable_sort(data: st.DataObject) -> None:
    x = rows(data.draw, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)))
    count = data.draw(st.integers(1, x.shape[1]))
    want = [sorted(range(x.shape[1]), key=lambda i: (-row[i], i))[:count] for row in x.tolist()]
    assert best(x, count).tolist() == want


@given(pools())
def test_pools_grow_from_the_best_nodes(grown: tuple[Pool, int, int]) -> None:
    pool, depth, top_k = grown
    parents, values, tokens = pool.parents_N.tolist(), pool.values_N.tolist(), pool.tokens_N.tolist()
    assert len(pool) <= capacity(depth, top_k)
    levels = [0] * len(pool)
    for i, parent in enumerate(parents):
        assert parent < i
        levels[i] = 1 if parent == ROOT else levels[parent] + 1
        assert values[i] <= (0.0 if parent == ROOT else values[parent])
    assert len(set(zip(parents, tokens, strict=True))) == len(pool)
    assert max(levels) == depth
    for level in range(1, depth + 1):
        nodes = sorted((i for i in range(len(pool)) if levels[i] == level), key=lambda i: (-values[i], i))
        grown_from = pool.frontier.tolist() if level == depth else sorted({p for p in parents if p in nodes})
        wanted = nodes[:top_k]
        assert grown_from == (wanted if level == depth else sorted(wanted))


@given(pools(), st.integers(1, 60))
def test_the_best_candidates_are_a_tree(grown: tuple[Pool, int, int], count: int) -> None:
    pool = grown[0]
    chosen = rerank(pool, count)
    values = pool.values_N.tolist()
    want = sorted(range(len(pool)), key=lambda i: (-values[i], i))[:count]
    assert chosen.tolist() == sorted(want)
    tree = build(99, pool, chosen)
    assert len(tree) == 1 + min(count, len(pool)) and tree.tokens[0] == 99 and tree.depths[0] == 0
    assert all(0 <= parent < row for row, parent in enumerate(tree.parents) if row)
    paths = set()
    for row in range(len(tree)):
        path = []
        at = row
        while at != ROOT:
            path.append(tree.tokens[at])
            at = tree.parents[at]
        assert len(path) - 1 == tree.depths[row]
        paths.add(tuple(path))
    assert len(paths) == len(tree)


def random_tree(r: random.Random, size: int, vocab: int) -> Tree:
    tree = root_only(r.randrange(vocab))
    while len(tree) < size:
        tree = tree.grafted([r.randrange(vocab) for _ in range(r.randrange(1, 6))], size)
    return tree


@given(st.integers(0, 10**6), st.integers(1, 200))
def test_masks_show_ancestors_whatever_the_size(seed: int, size: int) -> None:
    tree = random_tree(random.Random(seed), size, 300)
    mask = tree.mask()
    for row in range(len(tree)):
        seen, at = set(), row
        while at != ROOT:
            seen.add(at)
            at = tree.parents[at]
        assert set(mask[row].nonzero()[:, 0].tolist()) == seen


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_a_walk_decides_what_going_token_by_token_decides(seed: int, size: int) -> None:
    r = random.Random(seed)
    tree = random_tree(r, size, 3)
    said: dict[tuple[int, ...], int] = {}

    def path(row: int) -> tuple[int, ...]:
        return () if row == 0 else (*path(tree.parents[row]), tree.tokens[row])

    def choose(row: int) -> int:
        return said.setdefault(path(row), r.randrange(3))

    accepted, tokens = walk(tree, choose)
    assert len(accepted) == len(tokens)
    assert [tree.tokens[row] for row in accepted[1:]] == tokens[:-1]
    assert [tree.parents[row] for row in accepted[1:]] == accepted[:-1]
    for i in range(len(tokens)):
        assert said[tuple(tokens[:i])] == tokens[i]  # each was decided after all those before it
    below = {tree.tokens[row] for row, parent in enumerate(tree.parents) if parent == accepted[-1]}
    assert tokens[-1] not in below


def test_grafting_shares_what_is_there_and_keeps_to_the_limit() -> None:
    tree = root_only(5).grafted([1, 2, 3], 10).grafted([1, 2, 4, 5], 10)
    assert (tree.tokens, tree.parents) == ((5, 1, 2, 3, 4, 5), (-1, 0, 1, 2, 2, 4))
    assert tree.grafted([1, 9, 9, 9], 7) == Tree((*tree.tokens, 9), (*tree.parents, 1))
    assert tree.grafted([1, 2, 3], 6) == tree


def test_a_chain_is_a_tree_of_width_one() -> None:
    pool = expand(None, torch.tensor([[-3.0, -1.0]]), 1)
    for _ in range(3):
        pool = expand(pool, torch.tensor([[-0.5, -4.0]]), 1)
    tree = build(7, pool, rerank(pool, 9))
    assert (tree.tokens, tree.parents, tree.depths) == ((7, 1, 0, 0, 0), (-1, 0, 1, 2, 3), (0, 1, 2, 3, 4))


@given(st.lists(st.floats(-12, 0), max_size=40), st.floats(0, 10), st.floats(0, 1))
def test_the_best_size_is_the_fastest(values: list[float], fixed_s: float, row_s: float) -> None:
    values.sort(reverse=True)
    size = best_size(values, fixed_s, row_s)
    assert 1 <= size <= len(values) + 1

    def speed(rows: int) -> float:
        tokens = 1 + sum(map(math.exp, values[: rows - 1]))
        return tokens / spent if (spent := fixed_s + rows * row_s) > 0 else tokens

    assert speed(size) >= max(map(speed, range(1, len(values) + 2))) * (1 - 1e-9)


@pytest.mark.parametrize(("fixed_s", "row_s"), [(0.1, 0.0), (0.1, 0.001), (0.01, 0.01), (0.0, 0.02)])
def test_sizes_follow_measured_times(fixed_s: float, row_s: float) -> None:
    values = [-0.2 * i for i in range(31)]
    stride = Stride(32)
    assert stride.rows(values) == 32  # nothing is known
    for step in itertools.count():
        rows = stride.rows(values)
        stride.measured(rows, fixed_s + rows * row_s)
        if step == 3:
            break
    assert stride.rows(values) == best_size(values, fixed_s, row_s)
    assert stride.rows([]) == 1


def test_sizes_that_have_settled_are_looked_at_again() -> None:
    values = [-0.2 * i for i in range(31)]
    stride, sizes = Stride(32), []
    for step in range(120):
        sizes.append(stride.rows(values))
        stride.measured(sizes[-1], 0.01 + 0.01 * sizes[-1] if step < 50 else 0.1)  # rows come to cost nothing
    assert sizes[40] < 32 and sizes[-1] == 32
