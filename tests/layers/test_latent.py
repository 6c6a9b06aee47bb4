"""Latent layers by themselves: new tokens, trees, forks over sharded latents, against each path from scratch in fp64.

Shapes: H query heads, N tokens, S new tokens, D head dim, E value dim, R width of a latent, P of its rotated part.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from apb.layers.base import Place, Step
from apb.layers.call import AttentionCall
from apb.layers.expansion import Expansion
from apb.layers.latent import Latent, LatentCache
from apb.layers.rows import LayerKV
from burst.kernels import kernel
from burst.layouts.layout import layout
from burst.transport import Transport, VirtualWorld

KIND = Latent(q_heads=4, nope=5, rope=3, kv_lora=7, v_dim=6)
LONG = 40  # tokens of a step for which keys and values are made
SCALE = 0.4
POOL = 400  # tokens that sequences are made of
TREE = (-1, 0, 0, 1, 1, 2, 4, 6, 6, 3, 5, 0, 11, 12)
TOLERANCE = 1e-12


@functools.cache
def drawn() -> tuple[Tensor, Tensor, Tensor, Expansion]:
    """Return q (1, H, N, D), latents (1, 1, N, R) and rotated parts (1, 1, N, P) of all tokens, and their matrix."""
    gen, k = torch.Generator().manual_seed(3), KIND
    shapes = [(1, k.q_heads, POOL, k.qk_dim), (1, 1, POOL, k.kv_lora), (1, 1, POOL, k.rope)]
    q, c, r = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
    weight = torch.randn(k.q_heads, k.nope + k.v_dim, k.kv_lora, generator=gen, dtype=torch.float64)
    return q, c, r, Expansion(weight, k.nope)


def path_output(path: list[int]) -> Tensor:
    """Return the output (H, E) of the last token of a sequence, keys and values written out by head."""
    q, c, r, by = drawn()
    out = []
    for head in range(KIND.q_heads):
        up_k, up_v = by.weight_HXR[head, : KIND.nope], by.weight_HXR[head, KIND.nope :]
        k = torch.cat([c[0, 0, path] @ up_k.T, r[0, 0, path]], dim=1)
        weights = (k @ q[0, head, path[-1]] * SCALE).softmax(0)
        out.append(weights @ (c[0, 0, path] @ up_v.T))
    return torch.stack(out)


def call_of(ids: list[int]) -> AttentionCall:
    q, c, r, by = drawn()
    return AttentionCall(5, q[:, :, ids], c[:, :, ids], r[:, :, ids], SCALE, latent=by)


class Hosts:
    """All hosts' caches of one layer, and the sequence that they stand for."""

    def __init__(self, hosts: int, kind: str, tokens: int) -> None:
        self.world, self.known = VirtualWorld(hosts), list(range(tokens))
        where, call = layout(kind, tokens, hosts), call_of(self.known)
        self.caches: list[LatentCache] = []
        for rank in range(hosts):
            cache = LatentCache(KIND)
            cache.fill(LayerKV(*(where.shard(x, rank, 2) for x in (call.k_BKSD, call.v_BKSE))))
            self.caches.append(cache)

    def fork(self) -> Hosts:
        out = Hosts.__new__(Hosts)
        out.world, out.known, out.caches = self.world, [*self.known], [cache.fork() for cache in self.caches]
        return out

    def step(self, ids: list[int], parents: tuple[int, ...] | None = None) -> None:
        """Run new tokens on all hosts; every row must see its own path."""

        def rank(t: Transport) -> Tensor:
            last = t.world - 1
            step = Step(Place(t, kernel()), len(self.known), len(ids), tuple(range(t.world)), t.rank == last, parents)
            return self.caches[t.rank].attend(call_of(ids), step)

        before = [sum(t.ledger.by_kind().values()) for t in self.world.transports]
        outs = self.world.run(rank)
        sent = [sum(t.ledger.by_kind().values()) - n for t, n in zip(self.world.transports, before, strict=True)]
        assert sent == [KIND.partial_bytes(8) * len(ids) * (len(outs) - 1)] * len(outs)
        for row in range(len(ids)):
            path, at = [ids[row]], row
            while (at := at - 1 if parents is None else parents[at]) >= 0:
                path.insert(0, ids[at])
            assert (outs[0][0, row] - path_output(self.known + path)).abs().max() < TOLERANCE
        assert all(torch.equal(out, outs[0]) for out in outs)
        if parents is None:
            self.known += ids

    def keep(self, ids: list[int], rows: list[int]) -> None:
        self.caches[-1].keep(rows)
        self.known += [ids[row] for row in rows]


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("hosts", [1, 2, 3, 5, 8])
def test_steps_trees_and_forks_see_their_paths(hosts: int, kind: str) -> None:
    for tokens in (1, 2 * hosts + 1, 50):  # with one token most hosts hold nothing
        here = Hosts(hosts, kind, tokens)
        here.step([100, 101, 102])
        tree = list(range(110, 110 + len(TREE)))
        here.step(tree, TREE)
        here.keep(tree, [0, 1, 4, 6, 8])  # a branch that is no prefix of the rows
        fork = here.fork()
        for other in (here, fork):
            again = list(range(130, 130 + len(TREE)))
            other.step(again, TREE)
            other.keep(again, [])  # all rejected
            other.step([150])
            other.step([160, 161, 162], (-1, 0, 0))
            other.keep([160, 161, 162], [0, 2])
        here.step(list(range(200, 200 + LONG)))
        long = list(range(250, 250 + LONG))
        here.step(long, tuple(i // 2 if i else -1 for i in range(LONG)))
        fork.caches[-1].restart()
        fork.known = list(range(tokens))
        fork.step([170, 171])
        held = here.caches[-1].tail
        assert held is not None and len(held) == len(here.known) - tokens + LONG


def test_both_ways_are_tried() -> None:
    assert KIND.absorbs(len(TREE)) is not KIND.absorbs(LONG)
    few = dataclasses.replace(KIND, kv_lora=512, nope=128, rope=64, v_dim=128)  # DeepSeek-V3's heads
    assert few.absorbs(170) and not few.absorbs(171)
    assert few.row_bytes(2) == 1152 and dataclasses.replace(few, q_heads=128).partial_bytes(2) == 128 * 260
