"""A schedule that the caller made, and everything that ranks must agree on before they send.

Shapes: B batch, H heads, S own tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from burst.errors import HostFailure, UserError
from burst.execution.attend import attention
from burst.layouts.layout import Layout, layout
from burst.schedules import NAMES, AttentionShape, schedule
from burst.transport import Message, Transport, VirtualWorld, run_virtual
from tests.support.attention_cases import Case, dense, inputs

N, WORLD, HEADS = 22, 4, (4, 2)
LAYOUT = layout("zigzag", N, WORLD)
SHAPE = AttentionShape(q_heads=HEADS[0], kv_heads=HEADS[1], head_dim=8, value_dim=8)


def call(t: Transport, heads: tuple[int, int] = HEADS, dim: int = 8, value_dim: int = 8, **options: Any) -> Any:
    drawn = inputs(heads, N, dim, value_dim, 1)[:3]
    where: Layout = options.pop("layout", LAYOUT)
    keys: Layout = options.get("keys") or where
    own = [side.shard(x, t.rank, 2) for side, x in zip((where, keys, keys), drawn, strict=True)]
    return attention(*own, transport=t, layout=where, **options)


@pytest.mark.parametrize("way", NAMES)
def test_a_schedule_of_ones_own_gives_the_same_answer(way: str) -> None:
    made = schedule(way, LAYOUT, SHAPE)
    got = LAYOUT.unshard(run_virtual(WORLD, lambda t: call(t, schedule=made)), 2)
    want = dense(Case(WORLD, heads=HEADS, edges=(0, N), dim=8, value_dim=8))[0]
    assert (got - want).abs().max() <= 1e-12


OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # what differs, the schedule's own arguments, the call's
    ("query heads 4", {}, {"heads": (8, 2)}),
    ("kv heads 2", {}, {"heads": (4, 4)}),
    ("kv heads 1", {"shape": replace(SHAPE, kv_heads=1)}, {}),
    ("head dim 8", {}, {"dim": 16}),
    ("value dim 8", {}, {"value_dim": 4}),
    ("contiguous of 22 tokens", {"layout": layout("contiguous", N, WORLD)}, {}),
    ("2 documents", {"layout": layout("zigzag", N, WORLD, (0, 5, N))}, {}),
    ("over 2 ranks", {"layout": layout("zigzag", N, 2)}, {}),
    ("causal False", {"causal": False}, {}),
    ("window 3", {"window": 3}, {}),
    ("window None", {}, {"window": 3}),
    ("nodes", {"nodes": (0, 0, 1, 1)}, {}),
    ("backward", {"phase": "backward"}, {}),
    ("traveller kv", {}, {"forward": "q"}),
    ("keys contiguous of 22 tokens", {"way": "ring", "keys": layout("contiguous", N, WORLD)}, {}),
    ("keys zigzag of 22 tokens", {"way": "ring"}, {"keys": layout("contiguous", N, WORLD)}),
]


@pytest.mark.parametrize("what, made_for, called_with", OTHERS, ids=[what for what, *_ in OTHERS])
@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_a_schedule_made_for_another_call_is_rejected(
    what: str, made_for: dict[str, Any], called_with: dict[str, Any], way: str
) -> None:
    options = {"way": way, "layout": LAYOUT, "shape": SHAPE} | made_for
    made = schedule(options.pop("way"), options.pop("layout"), options.pop("shape"), **options)
    world = VirtualWorld(WORLD)
    with pytest.raises(UserError, match="made for another call") as error:
        world.run(lambda t: call(t, schedule=made, **called_with))
    assert what in str(error.value.given), error.value
    assert not any(t.ledger.by_kind() for t in world.transports)


@pytest.mark.parametrize("way", NAMES)
def test_all_or_no_rank_returns_its_lse(way: str) -> None:
    world = VirtualWorld(2)
    with pytest.raises(HostFailure, match="hold another plan"):
        world.run(lambda t: attention_of_two(t, way, t.rank == 0))
    assert all(set(t.ledger.by_kind()) == {"agree"} for t in world.transports)


def attention_of_two(t: Transport, way: str, return_lse: bool) -> None:
    where = layout("zigzag", 8, 2)
    own = [where.shard(x, t.rank, 2) for x in inputs((2, 2), 8, 8, 8, 1)[:3]]
    attention(*own, transport=t, layout=where, schedule=way, return_lse=return_lse)


def test_digests_tell_everything_apart_that_changes_messages() -> None:
    chunk, keys = LAYOUT.extend(9)
    other = layout("contiguous", N, WORLD).extend(9, "zigzag")[1]
    found = [
        schedule("ring", chunk, SHAPE, keys=keys),
        schedule("ring", chunk, SHAPE, keys=other),  # the same programs; blocks of other lengths
        schedule("ring", chunk, replace(SHAPE, kv_heads=1), keys=keys),
        schedule("ring", LAYOUT, SHAPE),
        schedule("ring", LAYOUT, SHAPE, causal=False),
        schedule("ring", LAYOUT, SHAPE, window=100),
        schedule("ring", LAYOUT, SHAPE, nodes=(0, 0, 1, 1)),
        schedule("usp", LAYOUT, SHAPE, ulysses=2),
        schedule("usp", LAYOUT, replace(SHAPE, q_heads=2), ulysses=2),
    ]
    assert len({each.digest for each in found}) == len(found)


def test_a_virtual_rank_takes_no_message_for_another() -> None:
    def rank(t: Transport) -> None:
        x: Tensor = torch.zeros(3)
        t.exchange([Message(1 - t.rank, x)], [Message(1 - t.rank, x.clone())], kind=f"k{t.rank}", step="s").wait()

    with pytest.raises(HostFailure, match=r"sent k. .*, but the receiver expects k"):
        run_virtual(2, rank)
