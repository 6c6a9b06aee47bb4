"""Floating-point operations of a plan: linear layers and the mixing of tokens, anchors counted, scoring not."""

from __future__ import annotations

from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape


def attention_flops(shape: ModelShape, pairs: int) -> int:
    """Return the FLOPs of ``pairs`` query-key pairs of all heads in every sharded layer."""
    return pairs * sum(count * kind.heads * kind.pair_flops for kind, count in shape.sharded.items())


def mixing_flops(plan: PrefillPlan, rank: int) -> int:
    """Return the FLOPs of host ``rank`` for mixing the tokens that it runs, all layers."""
    shape = plan.shape
    total = attention_flops(shape, plan.host_plans[rank].pairs)
    if plan.spread is not None:
        for kind, count in shape.sharded.items():
            sizes = kind.attention_shape(shape.element_size)
            # Making the keys and values of a host's own tokens is among its linear layers.
            made = plan.spread.head_keys(rank, sizes) - kind.heads * plan.host_plans[rank].tokens_run
            pairs = plan.spread.head_pairs(rank, sizes)
            total += count * (kind.pair_flops * pairs + kind.expansion_flops * made)
    for kind, count in shape.replicated.items():
        total += count * sum(kind.flops(segment.sharding, rank) for segment in plan.segments(rank))
    return total


def prefill_flops(plan: PrefillPlan, rank: int) -> int:
    """Return the FLOPs of host ``rank`` for the context."""
    return 2 * plan.shape.linear_params * plan.host_plans[rank].tokens_run + mixing_flops(plan, rank)


def query_flops(plan: PrefillPlan, rank: int) -> int:
    """Return the FLOPs of host ``rank`` for the query phase, which runs on every host."""
    m, n, owner = plan.lengths.query, plan.lengths.context, rank == plan.hosts - 1
    held = plan.host_plans[rank].block_len
    mixing = sum(count * kind.step_flops(m, n, held, owner) for kind, count in plan.shape.kinds.items())
    return 2 * plan.shape.linear_params * m + mixing + (2 * plan.shape.head_params if owner else 0)


def critical_flops(plan: PrefillPlan) -> int:
    """Return the prefill FLOPs of the busiest host: the time that a prefill cannot go below."""
    return max(prefill_flops(plan, rank) for rank in range(plan.hosts))
