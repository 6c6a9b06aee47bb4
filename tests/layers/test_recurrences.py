"""Recurrences against loops over single tokens, in fp64 and by transformers' own functions; trees path by path.

Shapes: B batch (1), S tokens, G key heads, H value heads, K key dim, V value dim, M rows of a tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from apb.layers.recurrences import base, delta, mamba2
from apb.layers.recurrences.base import Affine, Scan
from apb.layers.recurrences.convolution import behind, columns, over_tree, tail
from apb.layers.recurrences.delta import DeltaScan
from apb.layers.recurrences.mamba2 import Mamba2Scan

NAMES = ("delta", "kda", "mamba2")
FUNCTIONS = {
    "delta": torch_chunk_gated_delta_rule,
    "kda": chunk_kimi_delta_attention,
    "mamba2": mamba2_chunk_scan,
}


def scan(name: str, tokens: int, dtype: torch.dtype = torch.float64, own: bool = True, seed: int = 0) -> Scan:
    """Return a call with slow decays: what a state held at the start is still there at the end."""
    gen = torch.Generator().manual_seed(seed)
    heads, key_heads, k, v = 4, 2, 6, 5
    function = None if own else FUNCTIONS[name]

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=gen, dtype=torch.float64)

    steps = draw(heads, k) if name == "kda" else draw(heads)
    rates = 10 ** (torch.rand(heads, generator=gen, dtype=torch.float64) * 2 - 3)  # 1e-3 to 0.1
    if name == "mamba2":
        dt = torch.nn.functional.softplus(steps)
        x, b, c = draw(heads, v), draw(key_heads, k), draw(key_heads, k)
        d = torch.randn(heads, generator=gen, dtype=torch.float64)
        x, dt, b, c, rates, d = (t.to(dtype) for t in (x, dt, b, c, rates, d))
        return Mamba2Scan(x, dt, b, c, -rates, d, 16, function)
    g = -rates.reshape((heads, 1) if name == "kda" else (heads,)) * torch.nn.functional.softplus(steps)
    groups = heads if name == "kda" else key_heads
    parts = draw(groups, k), draw(groups, k), draw(heads, v), g, draw(heads).sigmoid() / 8
    return DeltaScan(*(t.to(dtype) for t in parts), normalised=True, function=function)


def by_token(given: Scan, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return outputs and last state of a recurrence written out token by token."""
    out = []
    if isinstance(given, Mamba2Scan):
        heads, groups = given.x_BSHV.shape[2], given.b_BSGK.shape[2]
        b, c = (t.repeat_interleave(heads // groups, dim=2) for t in (given.b_BSGK, given.c_BSGK))
        if state is None:
            state = b.new_zeros(1, heads, given.x_BSHV.shape[3], b.shape[3])
        for t in range(given.tokens):
            dt = given.dt_BSH[:, t, :, None, None]
            state = (given.a_H[:, None, None] * dt).exp() * state + dt * given.x_BSHV[:, t, :, :, None] * b[
                :, t, :, None
            ]
            out.append((state * c[:, t, :, None]).sum(-1) + given.d_H[:, None] * given.x_BSHV[:, t])
        return torch.stack(out, 1), state
    assert isinstance(given, DeltaScan)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (given.q_BSGK, given.k_BSGK))
    group = given.v_BSHV.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, dim=2) / q.shape[-1] ** 0.5, k.repeat_interleave(group, dim=2)
    if state is None:
        state = q.new_zeros(1, *q.shape[2:], given.v_BSHV.shape[3])
    for t in range(given.tokens):
        decay = given.g_BSH[:, t].exp()
        state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        u = given.beta_BSH[:, t, :, None] * (given.v_BSHV[:, t] - (state * k[:, t, :, :, None]).sum(-2))
        state = state + k[:, t, :, :, None] * u[:, :, None]
        out.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(out, 1), state


def gap(a: Tensor, b: Tensor) -> float:
    """Return the greatest difference, measured by the size of what is expected."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", (True, False))
def test_runs_are_those_of_single_tokens(name: str, own: bool) -> None:
    given = scan(name, 150, torch.float64 if own else torch.float32, own)
    out, state = given.run(None)
    exact, end = by_token(scan(name, 150))
    limit = 1e-13 if own else 1e-5
    assert gap(out, exact) < limit and gap(state, end) < limit
    later, last = given.rows(0, 70).run(end.to(state.dtype))
    exact, end = by_token(scan(name, 150).rows(0, 70), end)
    assert gap(later, exact) < limit and gap(last, end) < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", (True, False))
@pytest.mark.parametrize("cuts", ([0, 1, 2, 4, 150], [0, 77, 150], [0, 64, 100, 103, 150]))
def test_stretches_composed_are_the_whole(name: str, own: bool, cuts: list[int]) -> None:
    """Maps compose in any grouping; a stretch cut in pieces has the same map; outputs are corrected by the state."""
    given = scan(name, 150, torch.float64 if own else torch.float32, own)
    exact, end = by_token(scan(name, 150))
    limit = 1e-12 if own else 1e-5
    whole: Affine | None = None
    maps = []
    for start, stop in itertools.pairwise(cuts):
        stretch = given.rows(start, stop)
        mapped = stretch.mapped()
        out = mapped.out_BSHV if whole is None else mapped.corrected(whole.u)
        assert gap(out, exact[:, start:stop]) < limit
        pieces = stretch.rows(stretch.tokens // 2, stretch.tokens).map_on(
            stretch.rows(0, stretch.tokens // 2).map_on(None) if stretch.tokens > 1 else None
        )
        assert gap(pieces.u, mapped.affine.u) < limit
        assert float((pieces.m - mapped.affine.m).abs().max()) < limit  # the unit matrix is the largest there is
        again = Affine.unpacked(mapped.affine.packed_X, mapped.affine.m.shape, mapped.affine.u.shape)
        assert torch.equal(again.m, mapped.affine.m) and torch.equal(again.u, mapped.affine.u)
        maps.append(mapped.affine)
        whole = Affine(None, mapped.affine.u) if whole is None else whole.then(mapped.affine)
    assert gap(whole.u, end) < limit
    grouped = maps[-1]
    for earlier in reversed(maps[:-1]):
        grouped = earlier.then(grouped)
    assert gap(grouped.apply(None), end) < limit
    state = torch.randn(end.shape, dtype=end.dtype)
    assert gap(grouped.apply(state.to(grouped.u.dtype)), by_token(scan(name, 150), state)[1]) < limit


@pytest.mark.parametrize("name", NAMES)
def test_long_calls_run_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = scan(name, 150, torch.float32, own=False)
    whole, mapped = given.run(None), given.mapped()
    state = torch.randn_like(whole[1])
    behind = mapped.corrected(state)
    for module in (base, delta, mamba2):
        for size in ("PIECE", "KDA_PIECE"):
            monkeypatch.setattr(module, size, 64, raising=False)
    again = given.mapped()
    for a, b in zip(
        (*given.run(None), again.affine.u, again.corrected(state)), (*whole, mapped.affine.u, behind), strict=True
    ):
        assert gap(a, b) < 1e-5
    assert float((again.affine.m - mapped.affine.m).abs().max()) < 1e-5


TREE = (-1, 0, 0, 1, 1, 2, 3, 3, 5, 5, 6, 8, 8, 11)  # parents


def path(parents: Sequence[int], row: int) -> list[int]:
    """Return a row's ancestors and itself, ascending."""
    rows: list[int] = []
    while row >= 0:
        rows, row = [row, *rows], parents[row]
    return rows


def seen(parents: Sequence[int]) -> Tensor:
    """Return who sees whom, (M, M)."""
    out = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for row in range(len(parents)):
        out[row, path(parents, row)] = True
    return out


def picked(given: Scan, rows: Sequence[int]) -> Scan:
    """Return the call of some rows, in this order."""
    parts = {n: getattr(given, n)[:, list(rows)] for n in vars(given) if "_BS" in n}
    return replace(given, **parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parents", (TREE, (-1,), tuple(range(-1, 31)), (-1, *[0] * 9)))
def test_every_row_of_a_tree_is_its_path_from_the_state(name: str, parents: tuple[int, ...]) -> None:
    given, (_, state) = scan(name, len(parents), seed=1), by_token(scan(name, 90))
    out, pending = given.tree(state, seen(parents))
    for row in range(len(parents)):
        rows = path(parents, row)
        exact, end = by_token(picked(given, rows), state)
        assert gap(out[:, row], exact[:, -1]) < 1e-12
        assert gap(pending.commit(torch.tensor(rows), state), end) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_trees_in_fp32_are_as_far_from_exact_as_runs(name: str) -> None:
    given, (_, state) = scan(name, len(TREE), torch.float32, own=False, seed=1), by_token(scan(name, 90))
    out, _ = given.tree(state.float(), seen(TREE))
    exact, _ = scan(name, len(TREE), seed=1).tree(state, seen(TREE))
    assert out.dtype == torch.float32 and gap(out, exact) < 1e-5


def test_convolutions_of_trees_and_stretches() -> None:
    conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3, dtype=torch.float64).requires_grad_(False)
    x, rows = torch.randn(1, 6, 40, dtype=torch.float64), torch.randn(1, 6, len(TREE), dtype=torch.float64)

    def convolve(x: Tensor) -> Tensor:
        return conv(x)[:, :, : x.shape[-1]]

    whole = convolve(x)
    assert gap(behind(x[:, :, 27:30], x[:, :, 30:], convolve), whole[:, :, 30:]) < 1e-14
    assert torch.equal(behind(None, x, convolve), whole)
    assert torch.equal(tail(x[:, :, :3], x[:, :, 3:4]), x[:, :, 1:4])
    assert torch.equal(tail(x[:, :, :3], x[:, :, 3:]), x[:, :, -3:])
    out = over_tree(x[:, :, -3:], rows, torch.tensor(columns(TREE, 4)), convolve)
    for row in range(len(TREE)):
        alone = convolve(torch.cat([x, rows[:, :, path(TREE, row)]], -1))
        assert gap(out[:, :, row], alone[:, :, -1]) < 1e-14
