"""Bytes that hosts send for a plan: formulas that the transports' ledgers must equal."""

from __future__ import annotations

import bisect
from collections import Counter

from apb.plan.plan import PrefillPlan

TOKEN_BYTES = 8  # one int64 per decided token, broadcast to every host
AGREE_BYTES = 32  # one SHA-256 per agreement, to every peer


def passing_bytes(plan: PrefillPlan, rank: int) -> int:
    """Return the bytes host ``rank`` sends to pass blocks, all layers. Source: APB, section 3.3; ring, direct: ours."""
    if plan.route == "ring":
        rows = sum(plan.kept_rows[: rank + 1]) if rank < plan.hosts - 1 else 0
    elif plan.route == "allgather":
        rows = plan.kept_rows[rank] * (plan.hosts - 1)
    elif plan.route == "direct":
        rows = sum(plan.kept_rows[number] * _receiving(plan, number, rank) for number in plan.numbers[rank])
    else:
        rows = 0
    return rows * passed_row_bytes(plan)


def passed_row_bytes(plan: PrefillPlan) -> int:
    """Return the bytes of one row that is passed on, all sharded layers."""
    return sum(count * kind.row_bytes(plan.shape.element_size) for kind, count in plan.shape.sharded.items())


def _receiving(plan: PrefillPlan, number: int, owner: int) -> int:
    """Return how many ``plan.receivers`` a block has, in closed form: a thousand hosts have a million pairs."""
    later = plan.hosts - bisect.bisect_right(plan.last_numbers, number)
    return later - (plan.numbers[owner][-1] > number)


def anchor_bytes(plan: PrefillPlan, rank: int) -> int:
    """Return the bytes host ``rank`` sends to share the anchor: K and V, and the question's queries where asked."""
    s, shared = plan.shape, plan.shared_anchor
    if shared is None:
        return 0
    first, last = plan.question_rows(rank)
    asked = sum(count * kind.query_bytes(s.element_size) for kind, count in s.sharded.items()) if shared.question else 0
    own = plan.host_plans[rank].anchor_len * passed_row_bytes(plan) + (last - first) * asked
    return own * (plan.hosts - 1)


def prefill_bytes(plan: PrefillPlan, rank: int) -> dict[str, int]:
    """Return the bytes host ``rank`` sends while the context is prefilled, by kind, all layers."""
    s, e = plan.shape, plan.shape.element_size
    kinds = Counter[str]()
    if plan.spread is None:
        kinds.update({"anchor": anchor_bytes(plan, rank), "passing": passing_bytes(plan, rank)})
    else:
        for kind, count in s.sharded.items():
            sent = plan.spread.sent(rank, kind.attention_shape(e))
            kinds.update({kind.travels if name == "kv" else name: count * each for name, each in sent.items()})
    for kind, count in s.replicated.items():
        for segment in plan.segments(rank):
            sent = kind.sent(segment.sharding, rank, e, segment.kept)
            kinds.update({name: count * each for name, each in sent.items()})
    if plan.draft is not None and rank != plan.hosts - 1:
        kinds["draft"] = plan.draft.sent(plan.host_plans[rank].spans, plan.lengths.context)
    return dict(kinds)


def partial_bytes(plan: PrefillPlan, tokens: int) -> int:
    """Return the bytes each host sends to merge the attention of ``tokens`` query or decoded tokens, all layers."""
    return (plan.hosts - 1) * tokens * plan.shape.partial_bytes


def bytes_by_kind(plan: PrefillPlan, query_tokens: int, decided: int = 0, forwarded: int = 0) -> dict[str, int]:
    """Return the bytes all hosts send together: prefill, ``query_tokens`` in the query phase, then ``decided`` tokens
    of which ``forwarded`` went through the model again."""
    peers = plan.hosts - 1
    kinds = Counter(
        {
            "agree": AGREE_BYTES * plan.hosts * peers,
            "partials": plan.hosts * partial_bytes(plan, query_tokens + forwarded),
            "token": TOKEN_BYTES * decided * peers,
        }
    )
    for rank in range(plan.hosts):
        kinds.update(prefill_bytes(plan, rank))
    return {kind: count for kind, count in kinds.items() if count}


def sent_bytes(plan: PrefillPlan) -> int:
    """Return the bytes that all hosts send before the question runs."""
    return sum(sum(prefill_bytes(plan, rank).values()) for rank in range(plan.hosts))
