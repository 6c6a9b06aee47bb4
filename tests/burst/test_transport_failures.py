"""Whatever fails between ranks names rank, step and peer, soon."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from burst import HostFailure, Transport, VirtualWorld, run_virtual
from burst.transport import Message
from tests.burst.test_transport import along_the_chain, links_on_rank, number
from tests.support.pool import Pool, Rank, shared_pool

# -- failures among virtual ranks -----------------------------------------------------------------------


def test_a_deadlock_is_found_at_once_and_named() -> None:
    def mismatched(t: Transport) -> None:
        if t.rank == 2:
            t.exchange([], [Message(1, number(0))], kind="x", step="receive what nobody sends").wait()

    with pytest.raises(HostFailure, match="every host waits") as caught:
        run_virtual(3, mismatched)
    assert (caught.value.rank, caught.value.peer) == (2, 1)
    assert caught.value.step == "receive what nobody sends"
    assert "[0, 1]" in str(caught.value)


def test_a_send_that_nobody_receives_is_a_deadlock() -> None:
    def unmatched(t: Transport) -> None:
        if t.rank == 0:
            t.exchange([Message(1, number(0))], [], kind="x", step="lonely send").wait()

    with pytest.raises(HostFailure) as caught:
        run_virtual(2, unmatched)
    assert (caught.value.rank, caught.value.step, caught.value.peer) == (0, "lonely send", 1)


def test_the_first_error_of_a_rank_is_raised_and_the_others_end() -> None:
    ended: dict[int, BaseException] = {}

    def failing(t: Transport) -> None:
        try:
            x = number(0)
            t.all_gather(x, [x.shape] * 3, kind="x", step="first").wait()
            if t.rank == 1:
                raise KeyError("rank 1 fails")
            t.all_gather(x, [x.shape] * 3, kind="x", step="second").wait()
        except BaseException as error:
            ended[t.rank] = error
            raise

    world = VirtualWorld(3)
    with pytest.raises(KeyError, match="rank 1 fails"):
        world.run(failing)
    for rank in (0, 2):
        assert isinstance(ended[rank], HostFailure) and "rank 1 fails" in str(ended[rank])
    assert world.run(lambda t: t.rank) == [0, 1, 2]  # the world is as good as new


def test_shapes_and_types_that_do_not_match_are_named() -> None:
    def other_shape(t: Transport, mine: Tensor) -> None:
        if t.rank == 0:
            t.exchange([Message(1, torch.zeros(2, 3))], [], kind="x", step="send").wait()
        else:
            t.exchange([], [Message(0, mine)], kind="x", step="receive").wait()

    for mine, words in (
        (torch.zeros(3, 2), r"\(2, 3\).*\(3, 2\)"),
        (torch.zeros(2, 3).int(), "float32.*int32"),
    ):
        with pytest.raises(HostFailure, match=words) as caught:
            run_virtual(2, lambda t, mine=mine: other_shape(t, mine))
        assert (caught.value.rank, caught.value.step, caught.value.peer) == (0, "receive", 1)


# -- failures among processes ---------------------------------------------------------------------------


def relay_with_a_failing_thread(me: Rank) -> str:
    """The second rank's thread fails when the block arrives; only wait() can tell."""

    def observer(event: str, step: str, peer: int) -> None:
        if event == "arrive":
            raise KeyError("the thread fails")

    me.transport.observer = observer
    try:
        along_the_chain(me.transport, [1, 1])
    except KeyError as error:
        return str(error)
    finally:
        me.transport.observer = None
    return ""


def test_what_fails_in_the_forwarding_thread_is_raised_by_wait() -> None:
    assert shared_pool(2).run(relay_with_a_failing_thread) == ["", "'the thread fails'"]


@pytest.fixture
def doomed() -> Iterator[Pool]:
    """Return two processes with a short deadline, which a test may break."""
    pool = Pool(2, timeout_s=3.0)
    assert pool.run(links_on_rank)  # connected
    yield pool
    pool.close()


def receive(me: Rank, how: str) -> tuple[float, HostFailure | None]:
    t, start = me.transport, time.monotonic()
    peer = 1 - me.index
    try:
        if how == "relay":
            t.relay(number(0), [number(0)], src=peer, dst=None, kind="x", step="layer 3: passing").wait()
        else:
            t.exchange([], [Message(peer, number(0))], kind="x", step="layer 3: passing").wait()
    except HostFailure as failure:
        return time.monotonic() - start, failure
    return time.monotonic() - start, None


def die(me: Rank) -> None:
    time.sleep(0.3)
    os._exit(1)


def stall(me: Rank) -> None:
    time.sleep(30)


@pytest.mark.parametrize("how", ["exchange", "relay"])
@pytest.mark.parametrize("other, within_s", [(die, 2.5), (stall, 5.0)])
def test_a_dead_or_stalled_peer_is_named_in_time(
    doomed: Pool, other: Callable[[Rank], None], within_s: float, how: str
) -> None:
    doomed.start(receive, how, only=(0,))
    doomed.start(other, only=(1,))
    took_s, failure = doomed.answer(0, within_s=10.0)
    assert isinstance(failure, HostFailure)
    assert (failure.rank, failure.step, failure.peer) == (0, "layer 3: passing", 1)
    assert took_s < within_s
    if other is stall:
        assert took_s > 2.5
    else:
        took_s, failure = doomed.run_one(0, receive, how)  # and again, once it is known
        assert isinstance(failure, HostFailure) and failure.peer == 1 and took_s < 3.5
