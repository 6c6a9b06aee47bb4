"""Programs of work and messages on a clock, given links and the order of calls."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from burst.planner.events import Activity, Begin, Busy, Finish, Interval, Overlap, Timeline, TimelineEvent
from burst.planner.topology import Topology


def replay(programs: Sequence[Iterable[TimelineEvent]], topology: Topology, overlap: Overlap = "ordered") -> Timeline:
    """Run the programs on a clock and return when everything happened.

    A message leaves once both ends have posted it. Each rank sends one message at a time per link class and receives
    one at a time, at full bandwidth in both directions. A sender does not wait for a receiver's port. Of messages that
    are ready together the nearest rank's goes first, as libraries rotate all-to-alls. A message arrives
    ``latency`` after the receiver has had its last byte.
    Raises AssertionError when the programs wait for each other for ever.
    """
    assert len(programs) == topology.world, (len(programs), topology.world)
    return _Replay(programs, topology, overlap).run()


def interval(programs: Sequence[Sequence[TimelineEvent]], topology: Topology) -> Interval:
    """Replay the programs as ordered, without overlap, and with messages that cost nothing."""
    ordered = replay(programs, topology)
    free = replay(programs, topology, "full")
    worst = replay(programs, topology, "none").total_s
    best = max(free.total_s, *ordered.port_s)
    # Greedy ports are not monotone: an earlier post can delay somebody else's message by a hair.
    return Interval(
        min(best, ordered.total_s), ordered, max(worst, ordered.total_s), max(0.0, ordered.total_s - free.total_s)
    )


def parts(program: Iterable[TimelineEvent]) -> dict[str, float]:
    """Return the seconds of a program's work by purpose; ``other`` is the rest."""
    found: defaultdict[str, float] = defaultdict(float)
    for event in program:
        if isinstance(event, Busy):
            for name, seconds in event.parts:
                found[name] += seconds
            found["other"] += event.seconds - sum(seconds for _, seconds in event.parts)
    return dict(found)


@dataclass
class _UnderWay:
    """A start under way on one rank."""

    rank: int
    name: int
    forward_to: int | None
    open: int = 0  # messages whose end is not known yet
    end: float = 0.0


@dataclass
class _End:
    """One end of a message."""

    post: _UnderWay
    size: int
    ready: float


@dataclass
class _Wire:
    """Messages that two ranks have posted in one direction and not matched yet."""

    sends: deque[_End] = field(default_factory=deque)
    recvs: deque[_End] = field(default_factory=deque)


class _Replay:
    """Ranks and messages in order of time. A rank runs on until it must wait; a message is booked when it is ready."""

    def __init__(self, programs: Sequence[Iterable[TimelineEvent]], topology: Topology, overlap: Overlap) -> None:
        self.topology, self.overlap = topology, overlap
        self.programs: list[Iterator[TimelineEvent]] = [iter(program) for program in programs]
        self.now = [0.0] * len(programs)
        self.work = [0.0] * len(programs)
        self.spans: list[list[Activity]] = [[] for _ in programs]
        self.posts: dict[tuple[int, int], _UnderWay] = {}
        self.labels: dict[tuple[int, int], str] = {}
        self.asleep: dict[int, _UnderWay] = {}
        self.pairs: defaultdict[tuple[int, int], _Wire] = defaultdict(_Wire)
        self.free_at: defaultdict[tuple[int, str, str], float] = defaultdict(float)
        self.busy: defaultdict[tuple[int, str, str], float] = defaultdict(float)
        self.queue: list[tuple[float, int, int, _End, _End]] = []
        self.count = 0

    def run(self) -> Timeline:
        """Return the times once every program has ended."""
        for rank in range(len(self.programs)):
            self._advance(rank)
        while self.queue:
            ready, *_, send, recv = heapq.heappop(self.queue)
            self._transfer(ready, send, recv)
        assert not self.asleep, f"ranks {sorted(self.asleep)} wait for messages that never come"
        ports = [
            max((s for (r, *_), s in self.busy.items() if r == rank), default=0.0) for rank in range(len(self.now))
        ]
        return Timeline(tuple(self.now), tuple(self.work), tuple(ports), tuple(map(tuple, self.spans)))

    def _advance(self, rank: int) -> None:
        """Run a rank's program until it ends or must wait for messages whose end is not known yet."""
        for event in self.programs[rank]:
            match event:
                case Busy():
                    self._spend(rank, event.seconds)
                case Begin():
                    post = self._start(rank, event)
                    if self.overlap == "none" and not self._waited(post):
                        return
                case Finish():
                    if not self._waited(self.posts[rank, event.name]):
                        return

    def _spend(self, rank: int, seconds: float) -> None:
        start = self.now[rank]
        self.now[rank] += seconds
        self.work[rank] += seconds
        self.spans[rank].append(Activity(start, self.now[rank], "work", ""))

    def _waited(self, post: _UnderWay) -> bool:
        """Move the rank's clock to the end of a start; False where that is not known yet."""
        rank = post.rank
        if post.open:
            self.asleep[rank] = post
            return False
        if post.end > self.now[rank]:
            self.spans[rank].append(Activity(self.now[rank], post.end, "wait", self.labels[rank, post.name]))
            self.now[rank] = post.end
        return True

    def _start(self, rank: int, event: Begin) -> _UnderWay:
        post = self.posts[rank, event.name] = _UnderWay(rank, event.name, event.forward_to)
        self.labels[rank, event.name] = event.label
        for peer, size in event.sends:
            self._post(rank, peer, _End(post, size, self.now[rank]), sends=True)
        for peer, size in event.recvs:
            post.open += event.forward_to is not None  # the message that will be sent on
            self._post(peer, rank, _End(post, size, self.now[rank]), sends=False)
        return post

    def _post(self, src: int, dst: int, end: _End, *, sends: bool) -> None:
        """Queue one end, and book the message where the other one is here already."""
        end.post.open += 1
        pair = self.pairs[src, dst]
        (pair.sends if sends else pair.recvs).append(end)
        while pair.sends and pair.recvs:
            send, recv = pair.sends.popleft(), pair.recvs.popleft()
            assert send.size == recv.size, f"{src} sends {send.size} bytes, {dst} expects {recv.size}"
            self.count += 1
            distance = (dst - src) % len(self.now)
            heapq.heappush(self.queue, (max(send.ready, recv.ready), distance, self.count, send, recv))

    def _transfer(self, ready: float, send: _End, recv: _End) -> None:
        """Give a message its place on both ports, wake the ranks that wait for it, and forward it where asked to."""
        src, dst = send.post.rank, recv.post.rank
        done = arrived = ready
        if self.overlap != "full":
            kind = "intra" if self.topology.nodes[src] == self.topology.nodes[dst] else "inter"
            link, out, into = self.topology.link(src, dst), (src, kind, "out"), (dst, kind, "in")
            seconds = send.size / link.bandwidth
            done = self.free_at[out] = max(ready, self.free_at[out]) + seconds
            taken = self.free_at[into] = max(done, self.free_at[into] + seconds)
            for port in (out, into):
                self.busy[port] += seconds
            arrived = taken + link.latency
        onward = recv.post.forward_to
        if onward is not None:
            recv.post.open -= 1  # counted again by the message itself
            self._post(dst, onward, _End(recv.post, recv.size, arrived), sends=True)
        for post, over in ((send.post, done), (recv.post, arrived)):
            post.open -= 1
            post.end = max(post.end, over)
            if not post.open and self.asleep.get(post.rank) is post:
                del self.asleep[post.rank]
                self._waited(post)
                self._advance(post.rank)
