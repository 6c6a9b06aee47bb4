"""Exact attention over hosts as a part of the plan: who holds which positions, what is computed and sent.

Everything follows from a few words and a layer's sizes, so only the words travel with a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from apb.plan.counts import Counts, counts
from burst.layouts.layout import Layout, layout
from burst.schedules import AttentionShape, Schedule, head_groups, schedule


@dataclass(frozen=True)
class Spread:
    """The layout and schedule of burst that attends. ``ulysses``: hosts that share tokens by heads, in ``usp``."""

    schedule: str
    layout: str
    context: int  # tokens
    hosts: int
    ulysses: int | None = None

    def spans(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Positions [start, stop) that a host holds, ascending."""
        held = self.tokens().spans[rank]
        assert all(span.step == 1 for span in held), self.layout
        return tuple((span.start, span.stop) for span in held)

    def program(self, shape: AttentionShape, nodes: Sequence[int] | None = None) -> Schedule:
        """Return what every host does in one layer; ``nodes[r]`` is the machine of host r (None: one machine).

        Machines change who talks to whom, never what all hosts together send by kind. Raises UserError for hosts
        that the schedule cannot take.
        """
        where = tuple(nodes) if nodes is not None else (0,) * self.hosts
        return schedule(self.schedule, self.tokens(), shape, nodes=where, travels="kv", ulysses=self.ulysses)

    def sent(self, rank: int, shape: AttentionShape) -> dict[str, int]:
        """Bytes that a host sends in one layer, by kind; hosts on one machine."""
        return self._counts(shape).sent[rank]

    def head_pairs(self, rank: int, shape: AttentionShape) -> int:
        """Query-key pairs that a host computes in one layer, each head by itself."""
        return self._counts(shape).head_pairs[rank]

    def head_keys(self, rank: int, shape: AttentionShape) -> int:
        """Keys that a host attends to in one layer, its own among them, each head by itself."""
        return self._counts(shape).head_keys[rank]

    def workspace(self, rank: int, shape: AttentionShape) -> int:
        """Bytes of a host's buffers in one layer, and of its heads of the group's tokens."""
        return self._counts(shape).workspace[rank]

    def members(self) -> int:
        """Hosts that share their tokens by heads; raises UserError where they do not divide the hosts."""
        return head_groups(self.schedule, (0,) * self.hosts, self.ulysses)

    def tokens(self) -> Layout:
        """Return who holds which positions."""
        return _tokens(self.layout, self.context, self.hosts)

    def _counts(self, shape: AttentionShape) -> Counts:
        return counts(self.schedule, self.tokens(), shape, self.members())


@lru_cache(maxsize=64)
def _tokens(name: str, context: int, hosts: int) -> Layout:
    return layout(name, context, hosts)
