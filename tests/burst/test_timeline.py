"""The clock of programs, what a recorder sees, and the vectorised clock that must agree with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.costs.lockstep import Await, Clock, Exchange, HostWork, Relay, shift
from burst.planner.events import Begin, Busy, Finish, TimelineEvent
from burst.planner.timeline import interval, parts, replay
from burst.planner.topology import Link, Machine, Topology
from burst.planner.trace import TraceRecorder
from burst.transport import Transport, VirtualWorld
from burst.transport.base import Message
from tests.support.pool import Rank, on_both

BANDWIDTH, LATENCY = 10.0, 0.5  # bytes and seconds


def flat(hosts: int, per_node: int = 1, intra: float = BANDWIDTH) -> Topology:
    machine = Machine(Link(intra, LATENCY), Link(BANDWIDTH, LATENCY), 1.0, 1.0, 0.0)
    return Topology(tuple(r // per_node for r in range(hosts)), machine)


def test_a_message_is_hidden_behind_the_work_between_start_and_finish() -> None:
    def two(work: float) -> list[list[TimelineEvent]]:
        sender: list[TimelineEvent] = [Busy(1.0), Begin(0, ((1, 20),), ()), Finish(0)]
        receiver: list[TimelineEvent] = [Begin(0, (), ((0, 20),)), Busy(work), Finish(0), Busy(1.0)]
        return [sender, receiver]

    short, long = replay(two(1.0), flat(2)), replay(two(9.0), flat(2))
    assert short.total_s == 1 + 2 + LATENCY + 1 and long.total_s == 10
    assert short.idle_s == (3.5, 2.5) and short.work_s == (1.0, 2.0)
    assert [(s.what, s.start, s.stop) for s in short.spans[1]] == [("work", 0, 1), ("wait", 1, 3.5), ("work", 3.5, 4.5)]
    both = interval(two(3.0), flat(2))
    # Nothing hidden: waits for the message first. All hidden: only the sender's work stands before it.
    assert (both.worst_s, both.ordered.total_s, both.best_s) == (3.5 + 3 + 1, 3.5 + 1, 4.0)
    assert both.exposed_s == 0.5


def test_ports_carry_one_message_at_a_time_and_link_classes_their_own() -> None:
    """Rank 0 sends 10 bytes each to 1 (its own machine) and to 2 and 3 (another)."""
    sender: list[TimelineEvent] = [Begin(0, ((1, 10), (2, 10), (3, 10)), ()), Finish(0)]
    others: list[list[TimelineEvent]] = [[Begin(0, (), ((0, 10),)), Finish(0)] for _ in range(3)]
    times = replay([sender, *others], flat(4, per_node=2, intra=5.0))
    assert times.ends == (2.0, 2.5, 1.5, 2.5)
    assert times.port_s == (2.0, 2.0, 1.0, 1.0)


def test_a_relay_forwards_without_its_rank() -> None:
    first: list[TimelineEvent] = [Begin(0, ((1, 10),), ()), Finish(0)]
    middle: list[TimelineEvent] = [Begin(0, ((2, 10),), ((0, 10),), 2), Busy(100.0), Finish(0)]
    last: list[TimelineEvent] = [Begin(0, (), ((1, 10), (1, 10))), Finish(0)]
    assert replay([first, middle, last], flat(3)).ends == (1.0, 100.0, 3.0)


def test_programs_that_cannot_go_on_are_told() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] wait"):
        replay([[], [Begin(0, (), ((0, 8),)), Finish(0)]], flat(2))
    with pytest.raises(AssertionError, match="sends 8 bytes"):
        replay([[Begin(0, ((1, 8),), ())], [Begin(0, (), ((0, 9),))]], flat(2))


def test_parts_of_a_program() -> None:
    program: list[TimelineEvent] = [Busy(2.0, (("attention", 0.5), ("linear", 1.0))), Begin(0, (), ()), Busy(1.0)]
    assert parts(program) == {"attention": 0.5, "linear": 1.0, "other": 1.5}


class FakeClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_recorder_sees_work_calls_and_parts() -> None:
    clocks = [FakeClock() for _ in range(2)]
    recorders = [TraceRecorder(clock) for clock in clocks]
    world = VirtualWorld(2)

    def rank(t: Transport) -> None:
        clock = clocks[t.rank]
        t.recorder = recorders[t.rank]
        with t.recorder.recording():
            with t.during("attention"):
                clock.now += 1.0
            clock.now += 2.0
            x, y = torch.zeros(4), torch.zeros(4)
            handle = t.exchange([Message(1 - t.rank, x)], [Message(1 - t.rank, y)], kind="k", step="there")
            clock.now += 4.0
            handle.wait()
            t.relay(x, [y] if t.rank else [], src=0 if t.rank else None, dst=None if t.rank else 1, kind="k", step="on")

    world.run(rank)
    assert recorders[0].events == [
        Busy(3.0, (("attention", 1.0),)),
        Begin(0, ((1, 16),), ((1, 16),), None, "there"),
        Busy(4.0),
        Finish(0),
        Busy(0.0),
        Begin(1, ((1, 16),), (), 1, "on"),
        Busy(0.0),
    ]
    assert recorders[1].events[-2] == Begin(1, (), ((0, 16),), None, "on")
    assert (
        replay([r.events for r in recorders], flat(2)).total_s == 7.0
    )  # the first message is hidden, nobody waits for the second


def programs(hosts: int, seconds: Any, sizes: Any, kind: str) -> tuple[list[list[TimelineEvent]], list[Any]]:
    """The same thing for both clocks: some work, everyone's message to later or all hosts, more work, a wait."""
    events: list[list[TimelineEvent]] = []
    for r in range(hosts):
        if kind == "relay":
            sends = ((r + 1, sizes[r]),) if r < hosts - 1 else ()
            recvs = tuple((r - 1, sizes[h]) for h in reversed(range(r)))
            start = Begin(0, sends, recvs, r + 1 if r < hosts - 1 else None)
        else:
            others = [(r + k) % hosts for k in range(1, hosts)]
            start = Begin(0, tuple((p, sizes[r]) for p in others), tuple((p, sizes[p]) for p in others))
        events.append([Busy(seconds[r]), start, Busy(seconds[-1 - r]), Finish(0)])
    work = np.array(seconds)
    exchange = tuple(shift(hosts, k, lambda source, _: np.array(sizes, dtype=float)[source]) for k in range(1, hosts))
    start = Relay("x", np.array(sizes, dtype=float)) if kind == "relay" else Exchange("x", exchange)
    return events, [HostWork({"a": work}), start, HostWork({"a": work[::-1].copy()}), Await("x")]


@settings(max_examples=60, deadline=None)
@given(
    hosts=st.integers(2, 9),
    per_node=st.sampled_from([1, 2, 3]),
    kind=st.sampled_from(["relay", "all"]),
    equal=st.booleans(),
    data=st.data(),
)
def test_the_vectorised_clock_agrees(hosts: int, per_node: int, kind: str, equal: bool, data: st.DataObject) -> None:
    number = st.integers(1, 40)
    sizes = [data.draw(number)] * hosts if equal else [data.draw(number) for _ in range(hosts)]
    seconds = [3.0] * hosts if equal else [data.draw(st.floats(0, 8)) for _ in range(hosts)]
    events, steps = programs(hosts, seconds, sizes, kind)
    where = flat(hosts, per_node)
    clock = Clock(where)
    clock.run(steps)
    want = replay(events, where), replay(events, where, "none")
    exactly = equal or kind == "relay"  # otherwise ports are given to whoever is ready, here in a fixed order
    for found, each in zip(clock.now, want, strict=True):
        if exactly:
            assert np.allclose(found, each.ends)
        assert abs(found.max() - each.total_s) <= 0.5 * each.total_s
    copies = range(hosts - 1, -1, -1) if kind == "relay" else [hosts - 1] * hosts
    assert clock.sent.sum() == sum(size * count for size, count in zip(sizes, copies, strict=True))


def gather_and_relay(t: Transport) -> list[TimelineEvent]:
    """Return what a recorder saw of an all-gather and a relay."""
    t.recorder = TraceRecorder()
    with t.recorder.recording():
        x = torch.full((3,), float(t.rank))
        parts_of_all = t.all_gather(x, [(3,)] * t.world, kind="k", step="all").wait()
        assert [int(part[0]) for part in parts_of_all] == list(range(t.world))
        buffers = [torch.empty(3) for _ in range(t.rank)]
        first, last = t.rank == 0, t.rank == t.world - 1
        src, dst = None if first else t.rank - 1, None if last else t.rank + 1
        t.relay(x, buffers, src=src, dst=dst, kind="k", step="on").wait()
    found, t.recorder = t.recorder.events, None
    return [event for event in found if not isinstance(event, Busy)]


def on_gloo(rank: Rank) -> list[TimelineEvent]:
    return gather_and_relay(rank.transport)


def test_real_ranks_are_recorded_as_virtual_ones() -> None:
    real, virtual = on_both(3, on_gloo, gather_and_relay)
    assert real == virtual
    assert virtual[1] == [
        Begin(0, ((0, 12), (2, 12)), ((0, 12), (2, 12)), None, "all"),
        Finish(0),
        Begin(1, ((2, 12),), ((0, 12),), 2, "on"),
        Finish(1),
    ]


def test_a_failure_inside_a_part_is_the_failure_that_is_seen() -> None:
    clock = FakeClock()
    recorder = TraceRecorder(clock)
    with pytest.raises(ValueError, match="mine"), recorder.recording():
        recorder.enter("linear")
        raise ValueError("mine")
    with recorder.recording(), recorder.during("attention"):
        clock.now += 1.0
    assert recorder.events == [Busy(1.0, (("attention", 1.0),))]
