"""Communication on streams of its own: what must be over before what, on stand-ins for CUDA and NCCL, and on GPUs.

A stand-in stream knows which operations are over for whatever is launched on it next. Messages begin with what the
stream that posted them knew; waiting for a message lets the current stream know it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as spawning

from burst.transport import Message
from burst.transport.process_group import ProcessGroupTransport


class Stream:
    """What is over for this stream's next operation."""

    def __init__(self, device: Any = None) -> None:
        self.known: set[str] = set()

    def wait_stream(self, other: Stream) -> None:
        self.known |= other.known


class Event:
    """An event that is recorded once, on a clock that counts records."""

    count = 0
    reached = 0  # the device has come to the record of this number

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Stream) -> None:
        Event.count += 1
        self.at = Event.count

    def query(self) -> bool:
        return self.at <= Event.reached

    def elapsed_time(self, other: Event) -> float:
        return 1000.0 * (other.at - self.at)


class World:
    """Stand-ins for torch.cuda's streams and torch.distributed's messages, as rank 1 of 3 sees them."""

    def __init__(self) -> None:
        self.compute = self.current = Stream()
        self.written: dict[int, str] = {}  # by buffer: what must be over before it is read
        self.begun: dict[str, set[str]] = {}  # by message: what was over when it began
        self.order: list[str] = []

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def message(self, kind: str, x: torch.Tensor, peer: int) -> World.Work:
        name = f"{kind} {int(x[0])}"
        if kind == "send":
            assert self.written[x.data_ptr()] in self.current.known, f"{name} begins before it is here"
        else:
            self.written[x.data_ptr()] = name
        self.begun[name] = set(self.current.known)
        self.order.append(f"{name} {peer}")
        return World.Work(self, name)

    class Work:
        def __init__(self, world: World, name: str) -> None:
            self.world, self.name = world, name

        def wait(self) -> None:
            self.world.current.known |= {self.name} | self.world.begun[self.name]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.current)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **options: None)
    monkeypatch.setattr(dist, "irecv", lambda x, peer, group: made.message("recv", x, peer))
    monkeypatch.setattr(dist, "isend", lambda x, peer, group: made.message("send", x, peer))
    monkeypatch.setattr(dist, "P2POp", lambda op, x, peer, group: (op, x, peer, group))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: [op(x, peer, group) for op, x, peer, group in ops])
    return made


def filled(world: World, number: int) -> torch.Tensor:
    """Return a buffer that the rank's own stream has just written."""
    x = torch.full((4,), float(number))
    world.written[x.data_ptr()] = f"write {number}"
    world.compute.known.add(f"write {number}")
    return x


def test_a_relay_forwards_on_its_own_stream(world: World) -> None:
    t = ProcessGroupTransport(device="cuda")
    own, buffers = filled(world, 1), [filled(world, 2), filled(world, 3)]
    handle = t.relay(own, buffers, src=0, dst=2, kind="passing", step="layer 0")
    assert world.order == ["send 1 2", "recv 2 0", "send 2 2", "recv 3 0", "send 3 2"]
    assert world.current is world.compute and "recv 2" not in world.compute.known, "the rank's stream goes on"
    for name in ("recv 2", "recv 3"):
        assert {"write 2", "write 3"} <= world.begun[name], "buffers may still be in use when they are received into"
    world.compute.known.add("attention")
    handle.wait()
    assert {"recv 2", "recv 3", "send 1", "send 2", "send 3"} <= world.compute.known, "memory may be used again"
    assert "attention" not in world.begun["recv 3"], "what is computed meanwhile holds up no message"


def test_the_last_of_a_relay_waits_for_what_it_received(world: World) -> None:
    t = ProcessGroupTransport(device="cuda")
    handle = t.relay(filled(world, 1), [filled(world, 2)], src=0, dst=None, kind="passing", step="layer 0")
    assert "recv 2" not in world.compute.known
    handle.wait()
    assert "recv 2" in world.compute.known, "no forward's wait stands in for it"


def test_a_second_relay_waits_for_what_its_buffers_held(world: World) -> None:
    t = ProcessGroupTransport(device="cuda")
    first = t.relay(filled(world, 1), [filled(world, 2)], src=0, dst=2, kind="passing", step="layer 0")
    first.wait()
    world.compute.known.add("layer 0 reads 2")
    t.relay(filled(world, 5), [filled(world, 6)], src=0, dst=2, kind="passing", step="layer 1")
    assert {"layer 0 reads 2", "recv 2", "send 2"} <= world.begun["recv 6"]


def test_an_exchange_is_waited_for_by_the_stream_alone(world: World) -> None:
    t = ProcessGroupTransport(device="cuda")
    buffer = filled(world, 7)
    handle = t.exchange([Message(2, filled(world, 8))], [Message(0, buffer)], kind="kv", step="ring")
    assert "recv 7" not in world.compute.known and {"write 7", "write 8"} <= world.begun["send 8"]
    handle.wait()
    assert {"recv 7", "send 8"} <= world.compute.known


def test_waiting_is_what_the_stream_stood_still(world: World) -> None:
    t = ProcessGroupTransport(device="cuda")
    t.exchange([], [Message(0, filled(world, 1))], kind="kv", step="one").wait()
    t.relay(filled(world, 2), [], src=None, dst=2, kind="passing", step="two").wait()
    assert t.waited_s == 0.0, "not known yet"
    t.settle()
    t.settle()
    assert t.waited_s == 2.0, "each wait's two events are one apart"


def test_waits_that_are_over_are_added_up_without_being_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = ProcessGroupTransport(device="cuda")
    monkeypatch.setattr(Event, "reached", Event.count + 4)  # the end of the second of these waits
    for number in range(5):
        t.exchange([], [Message(0, filled(world, number))], kind="kv", step="ring").wait()
    assert t.waited_s == 2.0 and len(t._stalls) == 3
    monkeypatch.setattr(Event, "reached", Event.count)
    t.settle()
    assert t.waited_s == 5.0 and not t._stalls


# -- on real devices ----------------------------------------------------------------------------------------------


def _serve(rank: int, world: int, port: int) -> None:
    """One NCCL rank: relays and exchanges whose inputs are late and whose memory is used again at once."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    t = ProcessGroupTransport.connect(rank, world, ("127.0.0.1", port), device=device, timeout_s=60.0)
    t.agree("the same", step="agree")
    size = 1 << 20
    for layer in range(20):
        own = torch.empty(size, device=device)
        torch.cuda._sleep(2_000_000)  # the value is written long after the message was posted by the host
        own.fill_(float(100 * layer + rank))
        buffers = [torch.full((size,), -1.0, device=device) for _ in range(rank)]
        there = {"src": rank - 1 if rank else None, "dst": rank + 1 if rank < world - 1 else None}
        handle = t.relay(own, buffers, kind="passing", step=f"layer {layer}", **there)  # type: ignore[arg-type]
        gathered = t.all_gather(own, [own.shape] * world, kind="anchor", step=f"layer {layer}: anchor")
        torch.cuda._sleep(1_000_000)
        parts = gathered.wait()
        handle.wait()
        for back, buffer in enumerate(buffers, start=1):
            assert bool((buffer == 100 * layer + rank - back).all()), (layer, rank, back)
        for peer, part in enumerate(parts):
            assert bool((part == 100 * layer + peer).all()), (layer, rank, peer)
        del own, buffers, parts, gathered, handle
        torch.empty(8 * size, device=device).fill_(-2.0)  # takes the memory that has just been given back
    torch.cuda.synchronize(device)
    t.settle()
    assert world == 1 or t.waited_s > 0
    t.close()


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_nccl_ranks_pass_late_values_and_use_memory_again(world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    port = 20000 + os.getpid() % 20000
    spawning.spawn(_serve, (world, port), nprocs=world)  # type: ignore[no-untyped-call]
