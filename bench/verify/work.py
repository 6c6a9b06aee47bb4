"""What a strategy computes beside full attention: each host's own work, one thread, in one run."""

from __future__ import annotations

import statistics
from typing import Any

from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from bench.verify.full import document_text
from bench.verify.runner import Recorder

TOKENS, HOSTS = 7300, 8
SHARES = {"apb": (0.75, 0.11), "spava": (0.66, 0.09)}  # of full attention's work: all hosts, the slowest


def check(recorder: Recorder, model: str, repeats: int = 3) -> dict[str, Any]:
    """Compare ``apb``."""
    return compare(recorder, model, "apb", "work", repeats)


def compare(recorder: Recorder, model: str, strategy: str, prefix: str, repeats: int) -> dict[str, Any]:
    """Interleave full attention and ``strategy`` ``repeats`` times after a warm-up; medians decide."""
    full = Setup.make(EngineOptions(model, strategy="full", device="cpu", dtype="float32", threads=1))
    other = Setup.make(EngineOptions(model, strategy=strategy, hosts=HOSTS, device="cpu", dtype="float32", threads=1))
    ids = full.tokenizer(document_text(), add_special_tokens=False)["input_ids"]
    question = "Which statement binds names?"
    head = full.prompt(ids[:1], question).lengths.head
    with Engine.launch(full) as one, Engine.launch(other) as many:
        for engine in (one, many):
            engine.prefill(ids[:600], question).release()
        for i in range(repeats):
            recorder.sample(f"{prefix}/{i}", lambda: _one(one, many, ids[: TOKENS - head], question))
    rows = list(recorder.rows(f"{prefix}/"))
    out: dict[str, Any] = {"tokens": TOKENS, "hosts": HOSTS, "threads": 1, "repeats": len(rows)}
    for name in ("sum_share", "slowest_share", "full_s"):
        values = [row[name] for row in rows]
        out[name] = {"median": statistics.median(values), "spread": [min(values), max(values)]}
    most, slowest = SHARES[strategy]
    out["ok"] = out["sum_share"]["median"] <= most and out["slowest_share"]["median"] <= slowest
    return out


def _one(one: Engine, many: Engine, ids: list[int], question: str) -> dict[str, Any]:
    work = {}
    name = many.setup.strategy.name
    for engine in (one, many):
        handle = engine.prefill(ids, question)
        handle.release()
        work[engine.setup.strategy.name] = handle.metrics["host_work_s"]
    (full,) = work["full"]
    shares = sum(work[name]) / full, max(work[name]) / full
    return {
        "ok": all(share <= limit for share, limit in zip(shares, SHARES[name], strict=True)),
        "full_s": round(full, 3),
        "sum_share": round(shares[0], 4),
        "slowest_share": round(shares[1], 4),
        f"{name}_work_s": [round(x, 3) for x in work[name]],
    }
