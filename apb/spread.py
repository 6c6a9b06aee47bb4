"""Exact attention over hosts as a part of the plan: who holds which positions, what is computed and sent.

Everything follows from a few words and the model's shape, so only the words travel with a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from apb.plan import ModelShape
from burst.layouts import Layout, layout
from burst.predict import workspace_bytes
from burst.schedules import AttentionShape, Compute, Schedule, schedule


@dataclass(frozen=True)
class Spread:
    """Which of burst's layouts and schedules attends. ``ulysses``: hosts that share tokens by heads, in ``usp``."""

    schedule: str
    layout: str
    context: int  # tokens
    hosts: int
    ulysses: int | None = None

    def spans(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Positions [start, stop) that a host holds, ascending."""
        held = _tokens(self.layout, self.context, self.hosts).spans[rank]
        assert all(span.step == 1 for span in held), self.layout
        return tuple((span.start, span.stop) for span in held)

    def program(self, shape: ModelShape, nodes: Sequence[int] | None = None) -> Schedule:
        """Return what every host does in one layer; ``nodes[r]`` is the machine of host r (None: one machine).

        Machines change who talks to whom, never what all hosts together send by kind. Raises UserError for hosts
        that the schedule cannot take.
        """
        where = tuple(nodes) if nodes is not None else (0,) * self.hosts
        tokens = _tokens(self.layout, self.context, self.hosts)
        return schedule(self.schedule, tokens, attention_shape(shape), nodes=where, ulysses=self.ulysses)

    def sent(self, rank: int, shape: ModelShape) -> dict[str, int]:
        """Bytes that a host sends in one layer, by kind; hosts on one machine."""
        sent = Counter[str]()
        for (role, _), count in self.program(shape).bytes_sent(rank, attention_shape(shape)).items():
            sent[role] += count
        return dict(sent)

    def head_pairs(self, rank: int, shape: ModelShape) -> int:
        """Query-key pairs that a host computes in one layer, each head by itself."""
        made = self.program(shape)
        heads = made.heads_of(rank)
        computed = (step for step in made.programs[rank] if isinstance(step, Compute))
        pairs = sum(p.pairs for step in computed for p in made.pieces(step.q_block, step.kv_block))
        return pairs * (shape.q_heads if heads is None else heads.q_count)

    def workspace(self, rank: int, shape: ModelShape) -> int:
        """Bytes of a host's buffers in one layer, and of its heads of the group's tokens."""
        made, like = self.program(shape), attention_shape(shape)
        heads = made.heads_of(rank)
        rows = made.blocks.counts[made.block_of(rank)]
        dealt = 0 if heads is None else rows * (like.row_bytes("qkv", heads) + like.row_bytes("out", heads))
        return workspace_bytes(made, rank, like) + dealt


def attention_shape(shape: ModelShape) -> AttentionShape:
    """Return what burst's schedules count bytes with: one sequence, states in fp32 (fp64 for fp64)."""
    e = shape.element_size
    return AttentionShape(
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.head_dim,
        element_size=e,
        state_size=max(4, e),
        partial_size=e,
    )


@lru_cache(maxsize=64)
def _tokens(name: str, context: int, hosts: int) -> Layout:
    return layout(name, context, hosts)
