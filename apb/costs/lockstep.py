"""Many hosts on one clock, all at the same step: the rules of ``burst.planner.timeline`` on arrays, for many hosts.

A program is the same list of steps for all hosts, with numbers by host; a host that has nothing to do in one has zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from burst.planner.topology import Topology

Seconds = NDArray[np.float64]
Hosts = NDArray[np.int64]
Move = tuple[Hosts, Hosts, Seconds]  # from, to, bytes; every host at most once on each side


@dataclass(frozen=True)
class HostWork:
    """Own work by host and by what it goes to."""

    parts: dict[str, Seconds]


@dataclass(frozen=True)
class Exchange:
    """Start messages, in order."""

    name: str
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Relay:
    """Start passing ``sizes[h]`` bytes of every host h to all later ones, each hop forwarded on arrival."""

    name: str
    sizes: Seconds


@dataclass(frozen=True)
class Await:
    """Wait for what was started under that name."""

    name: str


ClockStep = HostWork | Exchange | Relay | Await


class Clock:
    """The time of every host, and its work and bytes so far.

    Two clocks in one, as arrays (2, hosts): messages are waited for where the steps say, or at once.
    """

    def __init__(self, topology: Topology) -> None:
        hosts = topology.world
        self.now = np.zeros((2, hosts))
        self.parts: dict[str, Seconds] = {}
        self.sent = np.zeros(2)  # bytes by link class: intra, inter
        self._free = np.zeros((2, 2, 2 * hosts))  # direction, clock, link class and host
        self._done: dict[str, Seconds] = {}
        machine = topology.machine
        self._nodes = np.asarray(topology.nodes)
        self._bandwidth = np.array([machine.intra.bandwidth, machine.inter.bandwidth])
        self._latency = np.array([machine.intra.latency, machine.inter.latency])

    @property
    def ends(self) -> Seconds:
        """Time at which the last host is done, on both clocks."""
        found: Seconds = self.now.max(axis=1)
        return found

    def run(self, program: Sequence[ClockStep]) -> None:
        """Do all steps once."""
        for step in program:
            match step:
                case HostWork(parts):
                    for name, seconds in parts.items():
                        self.now = self.now + seconds
                        self.parts[name] = self.parts.get(name, 0.0) + seconds
                case Exchange(name, moves):
                    self._start(name, self._exchange(moves))
                case Relay(name, sizes):
                    self._start(name, self._relay(sizes))
                case Await(name):
                    self.now = np.maximum(self.now, self._done[name])

    def _start(self, name: str, done: Seconds) -> None:
        self._done[name] = done
        self.now[1] = np.maximum(self.now[1], done[1])

    def _exchange(self, moves: Iterable[Move]) -> Seconds:
        posted, done = self.now, self.now.copy()
        for source, target, size in moves:
            end, arrived = self._transfer(source, target, size, np.maximum(posted[:, source], posted[:, target]))
            done[:, source] = np.maximum(done[:, source], end)
            done[:, target] = np.maximum(done[:, target], arrived)
        return done

    def _relay(self, sizes: Seconds) -> Seconds:
        posted, done = self.now, self.now.copy()
        hosts = posted.shape[1]
        source = np.arange(hosts - 1)
        ready = posted[:, :-1].copy()
        for hop in range(hosts - 1):  # host h sends the block of host h - hop
            mine = source[hop:]
            start = np.maximum(ready[:, hop:], posted[:, hop + 1 :])
            end, arrived = self._transfer(mine, mine + 1, sizes[: len(mine)], start)
            done[:, hop:-1] = np.maximum(done[:, hop:-1], end)
            done[:, hop + 1 :] = np.maximum(done[:, hop + 1 :], arrived)
            ready[:, hop + 1 :] = arrived[:, :-1]
        return done

    def _transfer(self, source: Hosts, target: Hosts, size: Seconds, ready: Seconds) -> tuple[Seconds, Seconds]:
        """Give messages their places on both ports; return when each has left and arrived (0: nothing is sent)."""
        link = (self._nodes[source] != self._nodes[target]).astype(np.int64)
        self.sent += np.bincount(link, size, 2)
        hosts = self.now.shape[1]
        out, into = link * hosts + source, link * hosts + target
        seconds = size / self._bandwidth[link]
        left = np.maximum(ready, self._free[0][:, out]) + seconds
        taken = np.maximum(left, self._free[1][:, into] + seconds)
        sends = size > 0
        if not sends.all():
            self._free[0][:, out[sends]], self._free[1][:, into[sends]] = left[:, sends], taken[:, sends]
            return left * sends, (taken + self._latency[link]) * sends
        self._free[0][:, out], self._free[1][:, into] = left, taken
        return left, taken + self._latency[link]


def shift(hosts: int, by: int, size: Callable[[Hosts, Hosts], Seconds], group: int | None = None) -> Move:
    """Return what every host sends to the one ``by`` places on, round all hosts or round each group of that many."""
    source = np.arange(hosts)
    size_of = hosts if group is None else group
    target = source - source % size_of + (source + by) % size_of
    return source, target, size(source, target)
