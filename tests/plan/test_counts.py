"""The closed forms of exact attention over hosts against the schedules that write every message out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from apb.plan.bytes import bytes_by_kind
from apb.plan.exact import Spread
from apb.plan.memory import host_memory
from apb.plan.shapes import PromptLengths
from apb.strategies import STRATEGIES, strategy
from burst.planner.predict import workspace_bytes
from burst.schedules import Compute
from tests.plan.test_plans import SHAPE

LAYOUTS = ("zigzag", "contiguous")


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["ring", "burst", "allgather", "ulysses", "usp"]),
    where=st.sampled_from(LAYOUTS),
    hosts=st.integers(1, 9),
    context=st.integers(1, 90),
    group=st.integers(1, 9),
)
def test_counts_are_those_of_the_schedule(name: str, where: str, hosts: int, context: int, group: int) -> None:
    if hosts > context or (name == "usp" and hosts % group):
        return
    spread = Spread(name, where, context, hosts, group if name == "usp" else None)
    like = SHAPE.heads.attention_shape(SHAPE.element_size)
    made = spread.program(like)
    for rank in range(hosts):
        heads = made.heads_of(rank)
        sent: Counter[str] = Counter()
        for (role, _), count in made.bytes_sent(rank, like).items():
            sent[role] += count
        assert {k: v for k, v in spread.sent(rank, like).items() if v} == {k: v for k, v in sent.items() if v}
        computed = (step for step in made.programs[rank] if isinstance(step, Compute))
        pairs = sum(p.pairs for step in computed for p in made.pieces(step.q_block, step.kv_block))
        assert spread.head_pairs(rank, like) == pairs * (SHAPE.heads.q_heads if heads is None else heads.q_count)
        rows = made.blocks.counts[made.block_of(rank)]
        dealt = 0 if heads is None else rows * (like.row_bytes("qkv", heads) + like.row_bytes("out", heads))
        if context >= 2 * hosts:  # shorter contexts leave hosts out, whose turn in a buffer goes to others
            assert spread.workspace(rank, like) == workspace_bytes(made, rank, like) + dealt


def test_a_thousand_hosts_are_planned_in_closed_form() -> None:
    lengths = PromptLengths(10_000_000, 24, 40, 64)
    for name in STRATEGIES:
        plan = strategy(name).plan(lengths, 1 if name == "full" else 1024, SHAPE)
        assert sum(host.block_len for host in plan.host_plans) == lengths.context
        assert bytes_by_kind(plan, lengths.query) is not None and host_memory(plan, plan.hosts - 1)["kv"] > 0
        if name in ("ring", "burst", "allgather"):
            assert bytes_by_kind(plan, 0)["kv"] == 1023 * lengths.context * SHAPE.kv_bytes
