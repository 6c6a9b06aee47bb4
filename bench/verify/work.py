"""What ``apb`` computes beside full attention: each host's own work, one thread, in one run."""

from __future__ import annotations

import statistics
from typing import Any

from apb.engine import Engine
from apb.setup import Setup
from bench.verify.full import document_text
from bench.verify.runner import Recorder

TOKENS, HOSTS = 7300, 8
SUM_SHARE, SLOWEST_SHARE = 0.75, 0.11  # of full attention's work


def check(recorder: Recorder, model: str, repeats: int = 3) -> dict[str, Any]:
    """Interleave both strategies ``repeats`` times after a warm-up; medians decide."""
    full = Setup.make(model, strategy="full", device="cpu", dtype="float32", threads=1)
    apb = Setup.make(model, strategy="apb", hosts=HOSTS, device="cpu", dtype="float32", threads=1)
    ids = full.tokenizer(document_text(), add_special_tokens=False)["input_ids"]
    question = "Which statement binds names?"
    head = full.prompt(ids[:1], question).lengths.head
    with Engine.launch(full) as one, Engine.launch(apb) as many:
        for engine in (one, many):
            engine.prefill(ids[:600], question).release()
        for i in range(repeats):
            recorder.sample(f"work/{i}", lambda: _one(one, many, ids[: TOKENS - head], question))
    rows = list(recorder.rows("work/"))
    out: dict[str, Any] = {"tokens": TOKENS, "hosts": HOSTS, "threads": 1, "repeats": len(rows)}
    for name in ("sum_share", "slowest_share", "full_s"):
        values = [row[name] for row in rows]
        out[name] = {"median": statistics.median(values), "spread": [min(values), max(values)]}
    out["ok"] = out["sum_share"]["median"] <= SUM_SHARE and out["slowest_share"]["median"] <= SLOWEST_SHARE
    return out


def _one(one: Engine, many: Engine, ids: list[int], question: str) -> dict[str, Any]:
    work = {}
    for name, engine in (("full", one), ("apb", many)):
        handle = engine.prefill(ids, question)
        handle.release()
        work[name] = handle.metrics["host_work_s"]
    (full,) = work["full"]
    shares = sum(work["apb"]) / full, max(work["apb"]) / full
    return {
        "ok": shares[0] <= SUM_SHARE and shares[1] <= SLOWEST_SHARE,
        "full_s": round(full, 3),
        "sum_share": round(shares[0], 4),
        "slowest_share": round(shares[1], 4),
        "apb_work_s": [round(x, 3) for x in work["apb"]],
    }
