"""One linear layer over hosts, and new tokens behind it, against the same layer on one host; nothing else of a model.

Shapes: B batch (1), S tokens, E hidden size, M rows of a tree.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apb.layers import linear
from apb.layers.base import Place, Step
from apb.layers.call import Call
from apb.layers.linear import Linear, LinearPrefill
from apb.layers.mixing import LinearCache
from apb.layers.recurrences.base import Affine, Mapped
from apb.layers.sharding import Segment, Sharding
from apb.layers.tree import depths
from apb.models.linear import hook_linear, linear_kind, recurrence
from burst.kernels import kernel
from burst.layouts.layout import layout
from burst.transport import Transport, VirtualWorld
from tests.support.families import build_family

FAMILIES = ("qwen3_next", "kimi_linear", "nemotron_h")  # delta, kda, mamba2
HOSTS = (1, 2, 3, 5, 8)
TREE = (-1, 0, 0, 1, 1, 2, 3, 3, 5, 5, 6, 8, 8, 11)
SECOND = (-1, 0, 1, 0, 2, 3, 3)


@functools.cache
def mixer(family: str) -> tuple[nn.Module, Linear]:
    """Return the first linear mixer of a family's random model in fp64, and its kind."""
    found = next(m for m in build_family(family, torch.float64).modules() if recurrence(m))
    hook_linear(found, 0)
    return found, linear_kind(found)


@functools.cache
def hidden(tokens: int, seed: int = 0) -> Tensor:
    """Return inputs (B, S, E) of a layer."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, 64, generator=gen, dtype=torch.float64)


class Recorded:
    """Stands in for attention; keeps what the layer is given, before norms that compute in fp32."""

    def __init__(self, run: Any) -> None:
        self.outs: list[Tensor] = []
        self._run = run

    def __call__(self, call: Call) -> Tensor:
        self.outs.append(self._run(call))
        return self.outs[-1]


def mixed(module: nn.Module, x_BSE: Tensor, run: Any) -> tuple[Tensor, Tensor]:
    """Return the convolution's output (S, C) and the recurrence's (S, H V) of some tokens."""
    recorded = Recorded(run)
    with torch.inference_mode():
        module(x_BSE, apb_attention=recorded)
    conv_BCS, scan_BSHV = recorded.outs
    return conv_BCS[0].T, scan_BSHV[0].flatten(1)


def over(
    module: nn.Module, kind: Linear, x_BSE: Tensor, sharding: Sharding, kept: bool = True
) -> tuple[Tensor, Tensor, list[LinearCache], VirtualWorld]:
    """Run a sequence over virtual hosts; return both outputs in position order, every host's cache, and the world."""
    world = VirtualWorld(sharding.hosts)

    def host(t: Transport) -> tuple[Tensor, Tensor, LinearCache]:
        rows = positions(sharding, t.rank)
        run = kind.prefill([Segment(0, len(rows), sharding, kept)], Place(t, kernel("reference")))
        assert isinstance(run, LinearPrefill)
        return (*mixed(module, x_BSE[:, rows], run), run.cache)

    found = world.run(host)
    order = torch.cat([positions(sharding, rank) for rank in range(sharding.hosts)]).argsort()
    conv, scan = (torch.cat([each[i] for each in found])[order] for i in (0, 1))  # type: ignore[misc]
    return conv, scan, [each[2] for each in found], world


def positions(sharding: Sharding, rank: int) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in sharding.spans[rank]])


def sharded(name: str, tokens: int, hosts: int) -> Sharding:
    """Return a layout of the strategies, or ``uneven``: stretches of one to a few tokens beside long ones."""
    if name == "uneven":
        sizes = [1, 2, tokens // 3, 1, 1, tokens // 4, 3][: 2 * hosts - 1]
        cuts = [0, *torch.tensor(sizes).cumsum(0).tolist(), tokens]
        spans = list(itertools.pairwise(cuts))
        return Sharding(tuple(tuple(spans[rank::hosts]) for rank in range(hosts)))
    where = layout(name, tokens, hosts)
    return Sharding(tuple(tuple((s.start, s.stop) for s in held) for held in where.spans))


def whole(family: str, tokens: int) -> tuple[Tensor, Tensor, LinearCache]:
    module, kind = mixer(family)
    conv, scan, (cache,), _ = over(module, kind, hidden(tokens), Sharding((((0, tokens),),)))
    return conv, scan, cache


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def kept(cache: LinearCache) -> tuple[Tensor, Tensor]:
    assert cache._state is not None and cache._tail_BCR is not None
    return cache._state, cache._tail_BCR


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ("gather", "doubling"))
def test_any_hosts_give_what_one_gives(family: str, way: Any) -> None:
    """Stretches down to single tokens, in fp64; all hosts keep the same bits, and send what the formula says."""
    module, kind = mixer(family)
    kind = replace(kind, scan=way)
    for tokens in (19, 131):
        conv, scan, cache = whole(family, tokens)
        for hosts in HOSTS:
            for name in ("contiguous", "zigzag", "uneven"):
                if name == "uneven" and not 1 < hosts < 5:
                    continue
                sharding = sharded(name, tokens, hosts)
                got_conv, got_scan, caches, world = over(module, kind, hidden(tokens), sharding)
                assert apart((got_conv, got_scan), (conv, scan)) <= 1e-12
                assert apart(kept(caches[0]), kept(cache)) <= 1e-12
                assert all(apart(kept(each), kept(caches[0])) == 0 for each in caches)
                for t in world.transports:
                    sent = {name: count for name, count in kind.sent(sharding, t.rank, 8).items() if count}
                    assert t.ledger.by_kind() == sent


def test_an_anchor_is_scanned_over_shares_and_leaves_nothing() -> None:
    module, kind = mixer("qwen3_next")
    sharding = Sharding(((), ((0, 9),), ((9, 30),), ((30, 31),)))
    world = VirtualWorld(4)

    def host(t: Transport) -> tuple[Tensor, Tensor] | None:
        run = kind.prefill([Segment(0, sharding.tokens(t.rank), sharding, False)], Place(t, kernel("reference")))
        assert isinstance(run, LinearPrefill)
        out = mixed(module, hidden(31)[:, positions(sharding, t.rank)], run) if t.rank else None
        assert run.cache._state is None and run.cache._tail_BCR is None
        return out

    found = [each for each in world.run(host) if each is not None]
    assert apart([torch.cat(each) for each in zip(*found, strict=True)], whole("qwen3_next", 31)[:2]) <= 1e-12
    for t in world.transports:
        assert t.ledger.by_kind() == {n: c for n, c in kind.sent(sharding, t.rank, 8, False).items() if c}


def test_bytes_are_those_of_the_formula_and_do_not_grow_with_the_context() -> None:
    kind = Linear("delta", 2 * 16 * 128 + 32 * 128, 4, 16, 32, 128, 128)
    p, s, border = 32 * 128 * 256 * 4, 32 * 128 * 128 * 4, 3 * kind.channels * 2
    for tokens in (8000, 80000):
        sharding = sharded("contiguous", tokens, 8)
        assert kind.sent(sharding, 0, 2) == {"conv": border, "state": 7 * s}
        assert kind.sent(sharding, 3, 2) == {"conv": border, "state": 7 * p}
        assert kind.sent(sharding, 7, 2) == {"conv": 7 * border, "state": 7 * p}
    assert kind.held_bytes(8000, 2) == s + border


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("broken", ("no state", "no map", "no halo"))
def test_controls_fail(family: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, scan, _ = whole(family, 131)
    if broken == "no state":
        monkeypatch.setattr(Mapped, "corrected", lambda self, state: self.out_BSHV)
    elif broken == "no map":
        monkeypatch.setattr(Affine, "apply", lambda self, state: self.u)
    else:
        monkeypatch.setattr(linear, "picked", lambda found, span, dim: torch.zeros_like(found[0][1][:, :, :3]))
    module, kind = mixer(family)
    got_conv, got_scan, _, _ = over(module, kind, hidden(131), sharded("contiguous", 131, 5))
    assert apart((got_scan,), (scan,)) > 1e-2 * float(scan.abs().max())
    assert (apart((got_conv,), (conv,)) > 1e-3) == (broken == "no halo")


def stepped(family: str, cache: LinearCache, x_BSE: Tensor, parents: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Run new tokens over a cache."""
    module, _ = mixer(family)
    t = VirtualWorld(1).transports[0]
    step = Step(Place(t, kernel("reference")), 0, x_BSE.shape[1], (0,), True, parents)
    return mixed(module, x_BSE, lambda call: cache.attend(call, step))


def path(parents: Sequence[int], row: int) -> list[int]:
    rows: list[int] = []
    while row >= 0:
        rows, row = [row, *rows], parents[row]
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_chains_trees_and_kept_branches(family: str) -> None:
    """Every row is its path from scratch; a branch that is no prefix is kept, and a second tree goes on behind it."""
    context, later, tree, second = hidden(47), hidden(20, 1), hidden(len(TREE), 2), hidden(len(SECOND), 3)
    cache = whole(family, 47)[2]
    module, kind = mixer(family)
    so_far = context

    def from_scratch(rows_BSE: Tensor, count: int) -> tuple[Tensor, Tensor]:
        x_BSE = torch.cat([so_far, rows_BSE], dim=1)
        conv, scan, *_ = over(module, kind, x_BSE, Sharding((((0, x_BSE.shape[1]),),)))
        return conv[-count:], scan[-count:]

    for x in (later[:, :1], later[:, 1:3], later[:, 3:]):  # short chains in closed form, long ones by the function
        assert apart(stepped(family, cache, x, None), from_scratch(x, x.shape[1])) <= 1e-12
        so_far = torch.cat([so_far, x], dim=1)
    for parents, rows, branch in ((TREE, tree, 13), (SECOND, second, 6), (SECOND, second, 0)):
        assert max(depths(parents)) > 2
        conv, scan = stepped(family, cache, rows, parents)
        for row in range(len(parents)):
            own = path(parents, row)
            assert apart((conv[row], scan[row]), [x[-1] for x in from_scratch(rows[:, own], 1)]) <= 1e-12
        taken = path(parents, branch)
        cache.keep(taken)
        so_far = torch.cat([so_far, rows[:, taken]], dim=1)
    x = later[:, :5]
    assert apart(stepped(family, cache, x, None), from_scratch(x, 5)) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_go_on_by_themselves_and_start_again_at_the_context(family: str) -> None:
    cache, x, tree = whole(family, 47)[2], hidden(4, 1), hidden(len(TREE), 2)
    before = kept(cache)
    first = stepped(family, cache, x, None)
    forked = cache.fork()
    stepped(family, cache, tree, TREE)
    cache.keep((0, 2, 5))
    other = stepped(family, forked, x, None)
    assert apart(other, first) > 1e-3  # it stands behind x already
    forked.restart()
    assert all(torch.equal(a, b) for a, b in zip(kept(forked), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stepped(family, forked, x, None), first, strict=True))
    cache.restart()
    assert all(torch.equal(a, b) for a, b in zip(stepped(family, cache, x, None), first, strict=True))


def test_models_that_are_not_ours_run_as_ever() -> None:
    """In the process that replaced their modules' functions, with a cache too."""
    mixer("qwen3_next")
    other = build_family("qwen3_next")
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        whole_SV = other(ids, use_cache=False).logits[0]
        out = other(ids[:, :30], use_cache=True)
        rest_SV = other(ids[:, 30:], past_key_values=out.past_key_values).logits[0]
    assert apart((torch.cat([out.logits[0], rest_SV]),), (whole_SV,)) < 1e-4
