"""Plans as rows of tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from apb.plan.bytes import bytes_by_kind, partial_bytes, prefill_bytes
from apb.plan.flops import prefill_flops, query_flops
from apb.plan.memory import NOTHING, Generation, host_memory, memory_by_kind
from apb.plan.plan import PrefillPlan


def host_rows(plan: PrefillPlan, answer: Generation = NOTHING) -> Iterator[dict[str, Any]]:
    """Yield one dictionary a host, for tables and JSON."""
    for r, host in enumerate(plan.host_plans):
        memory = host_memory(plan, r, answer)
        yield {
            "host": r,
            "start": host.start,
            "stop": host.stop,
            "spans": [list(span) for span in host.spans],
            "block_tokens": host.block_len,
            "anchor_tokens": host.anchor_len,
            "passing_rows": plan.passing_rows(r),
            "kept_rows": host.kept_rows,
            "prefill_flops": prefill_flops(plan, r),
            "query_flops": query_flops(plan, r),
            "passing_bytes": sum(prefill_bytes(plan, r).values()),
            "query_bytes": partial_bytes(plan, plan.lengths.query),
            "memory_bytes": sum(memory.values()),
            "memory": memory,
            "memory_by_kind": memory_by_kind(plan, r, answer),
        }


def plan_document(plan: PrefillPlan, answer: Generation = NOTHING) -> dict[str, Any]:
    """Return the plan as the JSON document shows it."""
    return {
        "strategy": plan.strategy,
        "compressor": plan.compressor,
        "hosts": plan.hosts,
        "exact": plan.exact,
        "chunk_tokens": plan.chunk_tokens,
        "lengths": asdict(plan.lengths),
        "anchor_len": plan.anchor_len,
        "passing_len": max(plan.kept_rows),
        "passing": plan.route,
        "bytes_by_kind": bytes_by_kind(plan, plan.lengths.query),
        "prefill_flops": [prefill_flops(plan, r) for r in range(plan.hosts)],
        "per_host": list(host_rows(plan, answer)),
    }
