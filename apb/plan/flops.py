"""Floating-point operations of a plan: linear layers and attention, anchors counted, scoring not."""

from __future__ import annotations

from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape


def attention_flops(shape: ModelShape, head_pairs: int) -> int:
    """Return the FLOPs of ``head_pairs`` query-key pairs in every layer, each head by itself."""
    return 4 * shape.head_dim * shape.layers * head_pairs


def prefill_flops(plan: PrefillPlan, rank: int) -> int:
    """Return the FLOPs of host ``rank`` for the context."""
    host = plan.host_plans[rank]
    return _flops(plan.shape, host.tokens_run, host.head_pairs(plan.shape.q_heads))


def query_flops(plan: PrefillPlan, rank: int) -> int:
    """Return the FLOPs of host ``rank`` for the query phase, which runs on every host."""
    m = plan.lengths.query
    owner = rank == plan.hosts - 1
    pairs = m * plan.host_plans[rank].block_len + (m * (m + 1) // 2 if owner else 0)
    head = 2 * plan.shape.head_params if owner else 0
    return _flops(plan.shape, m, pairs * plan.shape.q_heads) + head


def critical_flops(plan: PrefillPlan) -> int:
    """Return the prefill FLOPs of the busiest host: the time that a prefill cannot go below."""
    return max(prefill_flops(plan, rank) for rank in range(plan.hosts))


def _flops(shape: ModelShape, tokens: int, head_pairs: int) -> int:
    return 2 * shape.linear_params * tokens + attention_flops(shape, head_pairs)
