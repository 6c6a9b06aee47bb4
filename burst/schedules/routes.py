"""Routes: the ways on which blocks spread and results come home.

A block's home is the rank that owns it. Rank r uses block s in step ``Grid.step(r, s)``, whether or not other
steps are skipped. Only ranks that need a block receive it: every other rank is passed over, not passed through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

Needs = Callable[[int, int], bool]  # (rank, block): the rank computes something with the block


class Hop(NamedTuple):
    """One message: both ends post it in step ``post`` and wait before (results: after) ``due``'s work."""

    post: int
    channel: str
    due: int
    block: int
    src: int
    dst: int


@dataclass(frozen=True)
class Grid:
    """``rounds`` nodes with a ring of ``size`` ranks each; a flat ring is one node.

    Source: BurstAttention's double ring: in round b and step t of it, rank (n, l) works on the block of (n - b, l - t).
    """

    rounds: int
    size: int

    @property
    def world(self) -> int:
        """Ranks."""
        return self.rounds * self.size

    def step(self, rank: int, block: int) -> int:
        """The step in which ``rank`` works on ``block``; 0 for its own."""
        (n, i), (m, j) = divmod(rank, self.size), divmod(block, self.size)
        return (n - m) % self.rounds * self.size + (i - j) % self.size

    def visits(self, block: int, b: int) -> list[int]:
        """The ranks that work on ``block`` in round b, in order of their steps."""
        n, i = divmod(block, self.size)
        node = (n + b) % self.rounds
        return [node * self.size + (i + t) % self.size for t in range(self.size)]

    def source(self, rank: int, step: int) -> int:
        """The block that ``rank`` works on in ``step``."""
        n, i = divmod(rank, self.size)
        b, t = divmod(step, self.size)
        return (n - b) % self.rounds * self.size + (i - t) % self.size


def ring(grid: Grid, needs: Needs) -> list[Hop]:
    """Pass blocks from need to need round each node's ring; a round early, hand them on to the next node."""
    hops: list[Hop] = []
    for block in range(grid.world):
        entered = block
        for b in range(grid.rounds):
            stops = [r for r in grid.visits(block, b) if r == block or needs(r, block)]
            if b and stops:
                # Sent by the rank through which the block entered its node, as soon as it is there.
                posted = max(grid.step(entered, block), (b - 1) * grid.size)
                hops.append(Hop(posted, "inter", grid.step(stops[0], block), block, entered, stops[0]))
                entered = stops[0]
            for src, dst in pairwise(stops):
                due = grid.step(dst, block)
                hops.append(Hop(due - 1, "intra", due, block, src, dst))
    return hops


def star(grid: Grid, needs: Needs) -> list[Hop]:
    """Send every block from home to all who need it, at once: an all-gather without those who do not."""
    ranks = range(grid.world)
    return [
        Hop(0, "gather", grid.step(r, block), block, block, r)
        for block in ranks
        for r in ranks
        if r != block and needs(r, block)
    ]


def home(grid: Grid, needs: Needs) -> list[Hop]:
    """Send every result straight home as soon as it is there: a reduce-scatter, or pass-Q's partials."""
    ranks = range(grid.world)
    return [
        Hop(grid.step(r, block), "return", grid.step(r, block) + 1, block, r, block)
        for block in ranks
        for r in ranks
        if r != block and needs(r, block)
    ]


def chain(grid: Grid, needs: Needs) -> list[Hop]:
    """Let sums follow their blocks round the rings and come home, P hops when every rank contributes.

    The home's own contribution starts the sum of its node. That sum waits with the node's last contributor,
    while the sums of the other nodes are added up from node to node. Their total joins it there. One hop
    inside the node takes it home. So J-1 hops cross nodes, J(I-1)+1 do not.
    """
    hops: list[Hop] = []
    for block in range(grid.world):
        nodes = [[r for r in grid.visits(block, b) if needs(r, block)] for b in range(grid.rounds)]
        if not any(r != block for node in nodes for r in node):
            continue  # only the home contributes: nothing travels
        for node in nodes:
            for src, dst in pairwise(node):
                hops.append(Hop(grid.step(src, block), "sum-intra", grid.step(dst, block), block, src, dst))
        ends = [node[-1] for node in nodes[1:] if node]
        for src, dst in pairwise(ends):
            hops.append(Hop(grid.step(src, block), "sum-inter", grid.step(dst, block), block, src, dst))
        collector = nodes[0][-1] if nodes[0] else block
        ready = grid.step(collector, block)
        if ends:
            ready = grid.step(ends[-1], block) + 1
            hops.append(Hop(ready - 1, "sum-inter", ready, block, ends[-1], collector))
        if collector != block:
            hops.append(Hop(ready, "sum-intra", ready + 1, block, collector, block))
    return hops
