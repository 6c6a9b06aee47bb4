"""Measures all rows side by side, in rounds, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.attention.case import AttentionSettings, dense, rms_error
from bench.attention.ours import Ours, candidates
from bench.attention.peers import PEERS, measure, not_run
from bench.tools.timing import seconds
from burst.planner.candidates import Candidate

Row = dict[str, Any]


def rows(settings: AttentionSettings, tell: Callable[[str], None]) -> list[Row]:
    """Return a row for the dense call, for each of our schedules and for each peer.

    ``percent_of_ideal``: a P-th of the dense call's time over the busiest rank's own work; and with the modelled
    communication that no work hides added to it. Virtual ranks run one after another on one device.
    """
    torch.set_num_threads(1)
    whole = settings.inputs(settings.tokens)
    small = settings.inputs(min(settings.tokens, settings.error_tokens))
    want = dense(tuple(x.double() for x in small), settings.backward)
    dense(whole, settings.backward)
    speed = settings.flops() / seconds(lambda: dense(whole, settings.backward), settings.device)
    found_plans = candidates(settings, speed)
    runs = [Ours(settings, c) for c in found_plans if c.forward is not None]
    parts = runs[0].sharded(whole)
    dense_s: list[float] = []
    works: list[list[list[float]]] = [[] for _ in runs]
    before = [0] * len(runs)
    for turn in range(settings.warmup + settings.repeats):
        tell(f"Round {turn + 1} of {settings.warmup + settings.repeats}")
        if turn == settings.warmup:
            before = [each.sent() for each in runs]
        found_s = seconds(lambda: dense(whole, settings.backward), settings.device)
        found = [each.run(parts)[1] for each in runs]
        if turn >= settings.warmup:
            dense_s.append(found_s)
            for kept, ranks in zip(works, found, strict=True):
                kept.append(ranks)
    sent = [(each.sent() - b) // settings.repeats for each, b in zip(runs, before, strict=True)]
    error = rms_error(dense(small, settings.backward), want)
    out: list[Row] = [{"name": "dense, one call", **_spread("seconds", dense_s), "error": error, "sent_bytes": 0}]
    for each, work, count in zip(runs, works, sent, strict=True):
        out.append(_row(each.candidate, settings, dense_s, work) | {"sent_bytes": count})
        out[-1]["error"] = each.error(small, want)
    out += [{"name": c.name, "not_run": c.rejected} for c in found_plans if c.forward is None]
    return out + [_peer(name, settings, statistics.median(dense_s), tell) for name in PEERS]


def _row(candidate: Candidate, settings: AttentionSettings, dense_s: list[float], works: list[list[float]]) -> Row:
    exposed = candidate.exposed_s
    phases = [p for p in (candidate.forward, candidate.backward) if p is not None]
    ideal = [each / settings.ranks for each in dense_s]
    busiest = [max(work) for work in works]
    return {
        "name": candidate.name if candidate.ulysses is None else f"{candidate.name} {candidate.ulysses}",
        "travels": list(candidate.travels),
        **_spread("seconds", busiest),
        **_spread("percent_of_ideal", [100 * i / b for i, b in zip(ideal, busiest, strict=True)]),
        "modelled_exposed_s": exposed,
        **_spread("percent_with_communication", [100 * i / (b + exposed) for i, b in zip(ideal, busiest, strict=True)]),
        "formula_bytes": sum(sum(p.sent_bytes.values()) for p in phases),
    }


def _peer(name: str, settings: AttentionSettings, dense_s: float, tell: Callable[[str], None]) -> Row:
    """A peer's seconds hold its communication; whatever stops it is told in its row."""
    why = not_run(name, settings)
    if why:
        return {"name": name, "not_run": why}
    tell(name)
    try:
        found = measure(name, settings)
    except Exception as error:
        return {"name": name, "not_run": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"name": name, **found, "percent_with_communication": 100 * dense_s / settings.ranks / found["seconds"]}


def _spread(name: str, values: list[float]) -> Row:
    return {name: statistics.median(values), f"{name}_spread": [min(values), max(values)]}
