"""Shards of one sequence, by position: the context, or an anchor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Interval = tuple[int, int]  # positions [start, stop)


@dataclass(frozen=True)
class Sharding:
    """Positions [start, stop) of one sequence by host, ascending; a host may hold none."""

    spans: tuple[tuple[Interval, ...], ...]

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return len(self.spans)

    @property
    def length(self) -> int:
        """The position after the last one held."""
        return max((stop for held in self.spans for _, stop in held), default=0)

    @property
    def stretches(self) -> list[tuple[int, int, int]]:
        """All stretches (start, stop, host) in position order."""
        return sorted((start, stop, host) for host, held in enumerate(self.spans) for start, stop in held)

    def tokens(self, rank: int) -> int:
        """Tokens that a host holds."""
        return sum(stop - start for start, stop in self.spans[rank])

    def rows(self, rank: int, interval: Interval) -> Interval:
        """Return where positions within one of a host's stretches stand among its rows."""
        first = 0
        for start, stop in self.spans[rank]:
            if start <= interval[0] and interval[1] <= stop:
                return first + interval[0] - start, first + interval[1] - start
            first += stop - start
        raise AssertionError(f"host {rank} does not hold {interval}")


@dataclass(frozen=True)
class Segment:
    """One sequence among the tokens that a host runs in a pass: its rows there, and who holds what of it.

    ``kept``: what new tokens need of its end is kept; an anchor's is not.
    """

    start: int  # rows of the pass [start, stop)
    stop: int
    sharding: Sharding
    kept: bool


def cut(tokens: int, size: int) -> Iterator[Interval]:
    """Cut tokens into intervals of at most ``size``."""
    return ((start, min(start + size, tokens)) for start in range(0, tokens, size))


def union(intervals: list[Interval]) -> list[Interval]:
    """Return the positions of all intervals as disjoint ones, ascending, neighbours joined."""
    out: list[Interval] = []
    for start, stop in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Return the positions that both hold, ascending."""
    return union([(max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b])


def without(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Return the positions of ``a`` that ``b`` does not hold, ascending."""
    out = union(a)
    for low, high in union(b):
        out = [part for start, stop in out for part in ((start, min(stop, low)), (max(start, high), stop))]
        out = [(start, stop) for start, stop in out if start < stop]
    return out
