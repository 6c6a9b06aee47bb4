"""Transports: one contract, over virtual ranks and over gloo processes."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from burst import HostFailure, Transport, VirtualWorld, run_virtual
from burst.transport import Message
from tests.support.pool import Pool, Rank, shared_pool

Run = Callable[..., list[Any]]


def on_rank(me: Rank, fn: Callable[..., Any], *args: Any) -> Any:
    """Run a function of a transport on a process's transport."""
    me.transport.observer = None
    return fn(me.transport, *args)


@pytest.fixture(params=[("virtual", 2), ("virtual", 4), ("gloo", 2), ("gloo", 4)], ids=lambda p: f"{p[0]}-{p[1]}")
def run(request: pytest.FixtureRequest) -> Run:
    """Run ``fn(transport, *args)`` on every rank of one transport and return the results by rank."""
    kind, world = request.param
    if kind == "virtual":
        return lambda fn, *args: run_virtual(world, lambda t: fn(t, *args))
    return lambda fn, *args: shared_pool(world).run(on_rank, fn, *args)


def number(value: int, *size: int) -> Tensor:
    return torch.full(size or (3,), float(value))


def sent(t: Transport, before: dict[str, int]) -> dict[str, int]:
    """Return the bytes that one rank sent since ``before``."""
    now = t.ledger.by_kind()
    return {kind: now[kind] - before.get(kind, 0) for kind in now if now[kind] != before.get(kind, 0)}


# -- the contract ---------------------------------------------------------------------------------------


def several_to_the_next(t: Transport) -> list[float]:
    """Five messages in two exchanges to the next rank, received one by one and waited for backwards."""
    after, before = (t.rank + 1) % t.world, (t.rank - 1) % t.world
    into = [number(-1) for _ in range(5)]
    handles = []
    for a, b in ((0, 2), (2, 5)):
        sends = [Message(after, number(10 * t.rank + i)) for i in range(a, b)]
        handles.append(t.exchange(sends, [Message(before, into[i]) for i in range(a, b)], kind="x", step=f"{a}"))
    for handle in reversed(handles):
        handle.wait()
    return [float(x[0]) for x in into]


def test_messages_between_two_ranks_keep_their_order(run: Run) -> None:
    got = run(several_to_the_next)
    assert got == [[10 * ((r - 1) % len(got)) + i for i in range(5)] for r in range(len(got))]


def uneven(t: Transport, sizes: list[int]) -> tuple[list[list[float]], dict[str, int]]:
    before = t.ledger.by_kind()
    shapes = [(n, 2) for n in sizes[: t.world]]
    parts = t.all_gather(number(t.rank + 1, *shapes[t.rank]), shapes, kind="gathered", step="uneven").wait()
    return [part.flatten().tolist() for part in parts], sent(t, before)


@pytest.mark.parametrize("sizes", [[3, 1, 2, 5], [0, 4, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0]])
def test_all_gather_of_uneven_and_empty_parts(run: Run, sizes: list[int]) -> None:
    got = run(uneven, sizes)
    world = len(got)
    for rank, (parts, bytes_sent) in enumerate(got):
        assert parts == [[r + 1.0] * (2 * sizes[r]) for r in range(world)]
        own = sizes[rank] * 2 * 4 * (world - 1)
        assert bytes_sent == ({"gathered": own} if own else {})


def along_the_chain(t: Transport, rows: list[int]) -> tuple[list[list[float]], dict[str, int]]:
    before = t.ledger.by_kind()
    buffers = [torch.full((rows[h],), -1.0) for h in range(t.rank)]
    handle = t.relay(
        number(t.rank + 1, rows[t.rank]),
        buffers[::-1],
        src=t.rank - 1 if t.rank else None,
        dst=t.rank + 1 if t.rank < t.world - 1 else None,
        kind="passed",
        step="chain",
    )
    handle.wait()
    return [b.tolist() for b in buffers], sent(t, before)


@pytest.mark.parametrize("rows", [[2, 3, 1, 4], [0, 2, 0, 1]])
def test_a_relay_hands_every_block_to_every_later_rank(run: Run, rows: list[int]) -> None:
    got = run(along_the_chain, rows)
    world = len(got)
    for rank, (buffers, bytes_sent) in enumerate(got):
        assert buffers == [[h + 1.0] * rows[h] for h in range(rank)]
        own = sum(rows[: rank + 1]) * 4 if rank < world - 1 else 0
        assert bytes_sent == ({"passed": own} if own else {})


def exchange_and_forget(t: Transport) -> list[bool]:
    """Pass a block on, gather, wait, and forget all; returns which buffers are still in memory."""
    gc.collect()
    gc.disable()  # what refers to itself would stay until it is collected, with a layer's keys and values
    try:
        buffers = [torch.empty(3) for _ in range(t.rank)]
        first, last = t.rank == 0, t.rank == t.world - 1
        own, src, dst = number(t.rank), None if first else t.rank - 1, None if last else t.rank + 1
        t.relay(own, buffers, src=src, dst=dst, kind="k", step="chain").wait()
        parts = t.all_gather(own, [own.shape] * t.world, kind="k", step="all").wait()
        left = [weakref.ref(x) for x in (own, *buffers, *parts)]
        del own, buffers, parts
        t.agree("done", step="all have received")
        return [ref() is not None for ref in left]
    finally:
        gc.enable()


def test_nothing_holds_a_block_that_has_arrived(run: Run) -> None:
    for left in run(exchange_and_forget):
        assert not any(left)


def relay_then_overwrite(t: Transport) -> list[float]:
    """Overwrite everything as soon as wait() says that it may be forgotten, while one rank comes late."""
    rows = [1, 0, 1, 1]
    own, buffers = number(t.rank + 1, rows[t.rank]), [number(-1, rows[h]) for h in range(t.rank)]
    src, dst = (t.rank - 1 if t.rank else None), (t.rank + 1 if t.rank < t.world - 1 else None)
    if t.rank == 2:
        time.sleep(0.2)
        t.exchange([Message(0, number(0))], [], kind="late", step="late").wait()
    handle = t.relay(own, buffers[::-1], src=src, dst=dst, kind="passed", step="chain")
    if t.rank == 0 and t.world > 2:
        t.exchange([], [Message(2, number(0))], kind="late", step="late").wait()
    handle.wait()
    got = [b.tolist() for b in buffers]
    for x in (own, *buffers):
        x.fill_(-7.0)
    return got


def test_after_a_relay_everything_sent_may_be_forgotten(run: Run) -> None:
    got = run(relay_then_overwrite)
    assert got == [[[h + 1.0] * [1, 0, 1, 1][h] for h in range(rank)] for rank in range(len(got))]


def told_by(t: Transport, src: int) -> tuple[list[float], dict[str, int]]:
    before = t.ledger.by_kind()
    x = number(40 + t.rank)
    t.broadcast(x, src % t.world, kind="told", step="tell").wait()
    return x.tolist(), sent(t, before)


@pytest.mark.parametrize("src", [0, 3])
def test_broadcast(run: Run, src: int) -> None:
    got = run(told_by, src)
    world = len(got)
    for rank, (x, bytes_sent) in enumerate(got):
        assert x == [40.0 + src % world] * 3
        assert bytes_sent == ({"told": 12 * (world - 1)} if rank == src % world else {})


def agreed(t: Transport, texts: list[str]) -> tuple[str, int, dict[str, int]]:
    before = t.ledger.by_kind()
    try:
        t.agree(texts[t.rank], step="agree on the plan")
    except HostFailure as failure:
        assert failure.step == "agree on the plan" and failure.peer == 0
        return str(failure), failure.rank, sent(t, before)
    return "", -1, sent(t, before)


def test_agreement_names_the_odd_rank(run: Run) -> None:
    got = run(agreed, ["same"] * 4)
    world = len(got)
    assert got == [("", -1, {"agree": 32 * (world - 1)})] * world
    for odd in range(1, world):
        got = run(agreed, ["other" if r == odd else "same" for r in range(world)])
        for message, rank, bytes_sent in got:
            assert rank == odd and f"[{odd}]" in message
            assert bytes_sent == {"agree": 32 * (world - 1)}


def strided(t: Transport) -> list[float]:
    """Send what does not lie densely in memory."""
    x = torch.arange(6.0).view(2, 3).T[1:] + 100 * t.rank
    parts = t.all_gather(x, [x.shape] * t.world, kind="x", step="strided").wait()
    return [float(v) for part in parts for v in part.flatten()]


def test_strided_tensors_are_sent_as_they_look(run: Run) -> None:
    got = run(strided)
    want = [v + 100 * r for r in range(len(got)) for v in (1.0, 4.0, 2.0, 5.0)]
    assert got == [want] * len(got)


# -- the ledger's link classes --------------------------------------------------------------------------


def links(t: Transport) -> dict[str, int]:
    x = number(0, 5)
    t.all_gather(x, [x.shape] * t.world, kind="x", step="links").wait()
    return t.ledger.by_link()


def links_on_rank(me: Rank) -> dict[str, int]:
    return links(me.transport)


def test_links_inside_and_between_machines_are_told_apart() -> None:
    nodes = (0, 0, 0, 1)
    want = [{"intra": 40, "inter": 20}] * 3 + [{"inter": 60}]
    assert run_virtual(4, links, nodes=nodes) == want
    assert run_virtual(4, links) == [{"intra": 60}] * 4
    pool = Pool(2, nodes=(0, 1))
    try:
        assert pool.run(links_on_rank) == [{"inter": 20}] * 2
    finally:
        pool.close()


def test_two_virtual_runs_are_alike_event_by_event() -> None:
    def program(t: Transport) -> list[float]:
        x = number(t.rank, 4)
        for i in range(3):
            handle = t.all_gather(x, [x.shape] * t.world, kind="x", step=f"gather {i}")
            x = torch.stack(handle.wait()).mul(torch.arange(1.0, t.world + 1)[:, None]).sum(0)
            along_the_chain(t, [1, 2, 3, 4])
        return x.tolist()

    runs = []
    for _ in range(2):
        events: list[tuple[int, str, str, int]] = []
        observers = [lambda e, s, p, r=r, into=events: into.append((r, e, s, p)) for r in range(4)]
        runs.append((VirtualWorld(4, observers=observers).run(program), events))
    assert runs[0] == runs[1] and len(runs[0][1]) > 50


def test_waiting_is_not_a_ranks_own_work() -> None:
    def program(t: Transport) -> float:
        start = t.clock()
        if t.rank == 0:
            time.sleep(0.15)
        x = number(0)
        t.all_gather(x, [x.shape] * t.world, kind="x", step="gather").wait()
        return t.clock() - start - t.waited_s

    first, second = run_virtual(2, program)
    assert first > 0.14 and second < 0.05
