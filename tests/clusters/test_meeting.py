"""Rank 0 and another rank in one process: keys that are not there, and a rank 0 that hangs up."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from apb.clusters.outcome import Outcome
from burst.errors import UserError
from launch.torchrun.follower import Follower
from launch.torchrun.key import KEY_ENV
from launch.torchrun.leader import Leader
from launch.torchrun.line import LineError
from launch.torchrun.messages import Do, Drop, Stop
from launch.torchrun.place import Place


def place(rank: int, store: Any) -> Place:
    """One of two ranks, each on a machine of its own as far as keys go."""
    return Place(rank, 2, 0, rank, local=False, address="127.0.0.1", run="test", store=store)


def test_a_rank_without_the_key_that_rank_0_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "0123456789abcdef")
    store = dist.HashStore()
    leader = Leader(place(0, store))
    monkeypatch.delenv(KEY_ENV)
    try:
        with pytest.raises(UserError, match="a key in common"):
            Follower(place(1, store))
        began = time.monotonic()
        with pytest.raises(UserError, match="a key in common"):
            leader._meet(60.0)
        assert time.monotonic() - began < 10.0
    finally:
        leader.stop(failed=True)


def test_an_answer_that_rank_0_is_not_there_to_hear() -> None:
    """The listening thread ends the process, and tells of it where it must."""
    never = threading.Event()

    def lost(*_: object, **__: object) -> None:
        raise LineError("hung up")

    follower: Any = Follower.__new__(Follower)
    follower._line = SimpleNamespace(send=lost, receive=never.wait, close=lambda: None)
    follower._seat = SimpleNamespace(
        perform=lambda command: Outcome(),
        disconnect=lambda: None,
        progress=SimpleNamespace(idle_s=lambda: 0.0),
    )
    follower._vigil = SimpleNamespace(timeout_s=60.0, lost=lambda ranks: {})
    follower._due, follower._gone = SimpleNamespace(get=iter([Do(1, Drop()), Stop(failed=False)]).__next__), never
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(follower.follow()))
    thread.start()
    thread.join(20)
    assert codes == [0]
