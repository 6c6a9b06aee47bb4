"""Metrics of prefills and answers: the hosts' reports under the keys of the JSON document."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from apb.decode.base import Decoded
from apb.host.messages import HostReport
from apb.plan.plan import PrefillPlan
from apb.plan.report import plan_document
from apb.prompt.prompt import Prompt


def measured(reports: Sequence[HostReport], elapsed_s: float) -> dict[str, Any]:
    """Return what one call cost: sums and maxima over the hosts; ``elapsed_s`` is the caller's own time."""
    return _sent(reports) | {
        "prefill_s": max(r.wall_s for r in reports),
        "query_s": min(r.query_s for r in reports),  # of the host that starts it last; the others wait in theirs
        "request_s": elapsed_s,
        "host_work_s": [r.work_s for r in reports],
        "peak_rss_bytes": max(r.peak_rss_bytes for r in reports),
        "peak_device_bytes": max(r.peak_device_bytes for r in reports),
        "host_rss_growth_bytes": [r.peak_rss_bytes - r.rss_bytes for r in reports],
    }


def added(before: dict[str, Any], reports: Sequence[HostReport]) -> dict[str, Any]:
    """Return ``before`` with the bytes and the memory of a further call on the same cache."""
    sent = _sent(reports)
    peak = max(r.peak_rss_bytes for r in reports)
    return before | {
        "bytes_sent": before["bytes_sent"] + sent["bytes_sent"],
        "bytes_by_kind": dict(Counter(before["bytes_by_kind"]) + Counter(sent["bytes_by_kind"])),
        "bytes_by_link": dict(Counter(before["bytes_by_link"]) + Counter(sent["bytes_by_link"])),
        "peak_rss_bytes": max(before["peak_rss_bytes"], peak),
    }


def prefilled(prompt: Prompt, plan: PrefillPlan, reports: Sequence[HostReport], elapsed_s: float) -> dict[str, Any]:
    """Return what a prefill was and what it cost."""
    return {
        "strategy": plan.strategy,
        "compressor": plan.compressor,
        "hosts": plan.hosts,
        "context_tokens": plan.lengths.context,
        "query_tokens": prompt.lengths.query,
        "exact": plan.exact,
        "forked": False,
        "plan": plan_document(plan),
        "versions": versions(),
    } | measured(reports, elapsed_s)


def decoded(
    before: dict[str, Any], reports: Sequence[HostReport], answer: Decoded, decoder: str, ttft_s: float
) -> dict[str, Any]:
    """Return what an answer cost, its prefill (``before``) included.

    ``answer``: the owner's; ``ttft_s``: the caller's time from the request to the first token.
    """
    times_s, drafting = answer.times_s, answer.drafting
    spent = times_s[-1] - times_s[0]
    return added(before, reports) | {
        "ttft_s": ttft_s,
        "decode_tokens_per_s": (len(times_s) - 1) / spent if spent > 0 else None,
        "decoder": decoder,
        "decode_bytes": _sent(reports)["bytes_sent"],
        "decode_work_s": [r.work_s for r in reports],
        "accepted_length": drafting.accepted_length if drafting is not None else None,
        "drafting": asdict(drafting) if drafting is not None else None,
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("apb-prefill", "torch", "transformers", "ray"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _sent(reports: Sequence[HostReport]) -> dict[str, Any]:
    kinds, links = Counter[str](), Counter[str]()
    for report in reports:
        kinds.update(report.bytes_by_kind)
        links.update(report.bytes_by_link)
    return {"bytes_sent": kinds.total(), "bytes_by_kind": dict(kinds), "bytes_by_link": dict(links)}
