"""What a prefill adds to a host process: its block's KV and little more. Runs as torchrun processes over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from bench.verify.runner import Recorder

TOKENS, HOSTS = 7300, 8
ALLOWED_OVER_KV = 150_000_000  # bytes


def check(recorder: Recorder, model: str) -> dict[str, Any]:
    """Start one process a host, prefill 64 tokens, then the whole prompt; the growth of each process counts."""
    row = recorder.sample("memory/0", lambda: _run(model))
    return {name: value for name, value in row.items() if name not in ("key", "seconds", "commit")}


def _run(model: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={HOSTS}"]
    command += ["-m", "bench.verify.memory", model]
    out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    lines = out.stdout.strip().splitlines()
    if out.returncode or not lines:
        return {"ok": False, "error": out.stderr[-2000:]}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def measure(model: str) -> dict[str, Any]:
    """Rank 0's part, inside torchrun."""
    from apb.engine.engine import Engine
    from apb.engine.options import EngineOptions
    from apb.engine.setup import Setup
    from bench.verify.full import document_text

    setup = Setup.make(EngineOptions(model, hosts=HOSTS, strategy="apb", device="cpu", dtype="float32", threads=1))
    ids = setup.tokenizer(document_text(), add_special_tokens=False)["input_ids"]
    question = "Which statement binds names?"
    head = setup.prompt(ids[:1], question).lengths.head
    with Engine.launch(setup, cluster="torchrun") as engine:
        engine.prefill(ids[:64], question).release()
        handle = engine.prefill(ids[: TOKENS - head], question)
        grown = handle.metrics["host_rss_growth_bytes"]
        plan = handle.metrics["plan"]
    kv = [host["memory"]["kv"] for host in plan["per_host"]]
    over = [g - k for g, k in zip(grown, kv, strict=True)]
    return {
        "ok": max(over) <= ALLOWED_OVER_KV,
        "tokens": TOKENS,
        "hosts": HOSTS,
        "kv_mb": [round(k / 1e6, 1) for k in kv],
        "growth_mb": [round(g / 1e6, 1) for g in grown],
        "over_kv_mb": [round(o / 1e6, 1) for o in over],
        "allowed_over_kv_mb": ALLOWED_OVER_KV / 1e6,
    }


if __name__ == "__main__":
    from bench.report import document
    from launch.torchrun.start import lead

    sys.exit(lead(lambda: document(measure(sys.argv[1]))))
