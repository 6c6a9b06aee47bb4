"""Every causal language model of the installed transformers: exact, or rejected; as docs/models.md says."""

from __future__ import annotations

import dataclasses

from bench.tools.conditions import commit
from tests.claims.conftest import Claims, most
from tests.sweep.page import kept
from tests.sweep.run import architectures, sweep
from tests.sweep.verdict import EXACT, LIMIT, WRONG


def test_every_model_is_exact_or_rejected(claims: Claims) -> None:
    page = kept()
    missing = [name for name in architectures() if f"models/{name}" not in claims]
    for verdict in sweep(missing):
        as_written = verdict.verdict == page.get(verdict.model_type, verdict.verdict)
        row = dataclasses.asdict(verdict) | {"ok": verdict.verdict != WRONG and as_written}
        claims.add(f"models/{verdict.model_type}", row | {"commit": commit()})
    rows = claims.under("models/")
    exact = [row for row in rows if row["verdict"] == EXACT]
    claims.conclude("models", exact=len(exact), max_logits_error=most(exact, "error"), limits=[LIMIT])
