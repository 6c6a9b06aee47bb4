"""Floating-point operations of a plan: linear layers and the mixing of tokens, anchors counted, scoring not."""

from __future__ import annotations

from apb.layers.base import LayerKind
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape


def attention_flops(shape: ModelShape, pairs: int) -> int:
    """Return the FLOPs of ``pairs`` query-key pairs of all heads in every sharded layer."""
    return pairs * sum(count * kind.heads * kind.pair_flops for kind, count in shape.sharded.items())


def layer_flops(plan: PrefillPlan, kind: LayerKind, rank: int) -> int:
    """Return the FLOPs of host ``rank`` for mixing the tokens that it runs in one layer of this kind."""
    if not kind.sharded:
        return sum(kind.flops(segment.sharding, rank) for segment in plan.segments(rank))
    host = plan.host_plans[rank]
    if plan.spread is None:
        return kind.pair_flops * host.pairs * kind.heads
    sizes = kind.attention_shape(plan.shape.element_size)
    # Making the keys and values of a host's own tokens is among its linear layers.
    made = plan.spread.head_keys(rank, sizes) - kind.heads * host.tokens_run
    return kind.pair_flops * plan.spread.head_pairs(rank, sizes) + kind.expansion_flops * made


def part_flops(plan: PrefillPlan, rank: int) -> dict[str, int]:
    """Return the FLOPs of host ``rank`` for context and question by what they go to; the LM head is ``linear``."""
    m, n, owner = plan.lengths.query, plan.lengths.context, rank == plan.hosts - 1
    host, s = plan.host_plans[rank], plan.shape
    found = {"linear": 2 * s.linear_params * (host.tokens_run + m) + (2 * s.head_params if owner else 0)}
    for kind, count in s.kinds.items():
        mixed = layer_flops(plan, kind, rank) + kind.step_flops(m, n, host.block_len, owner)
        found[kind.part] = found.get(kind.part, 0) + count * mixed
    return found


def prefill_flops(plan: PrefillPlan, rank: int) -> int:
    """Return the FLOPs of host ``rank`` for the context."""
    mixed = sum(count * layer_flops(plan, kind, rank) for kind, count in plan.shape.kinds.items())
    return 2 * plan.shape.linear_params * plan.host_plans[rank].tokens_run + mixed


def query_flops(plan: PrefillPlan, rank: int) -> int:
    """Return the FLOPs of host ``rank`` for the query phase, which runs on every host."""
    return sum(part_flops(plan, rank).values()) - prefill_flops(plan, rank)


def critical_flops(plan: PrefillPlan) -> int:
    """Return the prefill FLOPs of the busiest host: the time that a prefill cannot go below."""
    return max(prefill_flops(plan, rank) for rank in range(plan.hosts))
