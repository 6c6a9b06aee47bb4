"""Chunked blocks: what a prefill needs beside what it keeps does not grow with the block. One process a host."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from apb.plan.memory import host_memory
from bench.verify.runner import Recorder

CHUNK = 256  # tokens
LENGTHS = (2000, 7000)  # context tokens of all hosts
CASES = {"full": 1, "star": 2, "apb": 2, "spava": 2, "ring": 2}  # strategy: hosts
MAY_GROW = 24_000_000  # bytes from the short block to the long one, beside KV and what the plan says stays whole


def check(recorder: Recorder, model: str) -> dict[str, Any]:
    """Compare each strategy's short and long context in chunks, and the long one whole."""
    short, long = LENGTHS
    strategies = {}
    for name, hosts in CASES.items():
        rows = [
            recorder.sample(f"chunks/{name}/{chunk}/{tokens}", partial(_run, model, name, hosts, tokens, chunk))
            for chunk, tokens in ((CHUNK, short), (CHUNK, long), (None, long))
        ]
        failed = [row for row in rows if not row["ok"]]
        if failed:
            return {"ok": False, "failed": failed}
        beside = [row["beside_mb"] for row in rows]
        strategies[name] = {
            "hosts": hosts,
            "beside_kv_and_stream_mb": dict(zip(("short", "long", "long_whole"), beside, strict=True)),
            "grows_mb": round(beside[1] - beside[0], 1),
            **{
                f"{key}{suffix}": row[key]
                for suffix, row in (("", rows[1]), ("_whole", rows[2]))
                for key in ("activations_mb", "planned_mb", "work_s")
            },
        }
    return {
        "ok": all(row["grows_mb"] * 1e6 <= MAY_GROW for row in strategies.values()),
        "context_tokens": LENGTHS,
        "chunk_tokens": CHUNK,
        "may_grow_mb": MAY_GROW / 1e6,
        "strategies": strategies,
    }


def _run(model: str, strategy: str, hosts: int, tokens: int, chunk: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={hosts}"]
    command += ["-m", "bench.verify.chunks", model, strategy, str(hosts), str(tokens), str(chunk or 0)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    lines = out.stdout.strip().splitlines()
    if out.returncode or not lines:
        return {"ok": False, "error": out.stderr[-2000:]}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def measure(model: str, strategy: str, hosts: int, tokens: int, chunk: int | None) -> dict[str, Any]:
    """Rank 0's part, inside torchrun: the busiest host's growth over what it keeps."""
    from apb.engine.engine import Engine
    from apb.engine.options import EngineOptions
    from apb.engine.setup import Setup
    from apb.plan.memory import whole_row_bytes
    from bench.verify.full import document_text

    setup = Setup.make(
        EngineOptions(
            model, hosts=hosts, strategy=strategy, device="cpu", dtype="float32", threads=1, chunk_tokens=chunk
        )
    )
    ids = setup.tokenizer(document_text(), add_special_tokens=False)["input_ids"]
    question = "Which statement binds names?"
    with Engine.launch(setup, cluster="torchrun") as engine:
        engine.prefill(ids[:64], question).release()
        prompt = setup.prompt(ids[:tokens], question)
        handle = engine.prefill(prompt)
        grown, work = handle.metrics["host_rss_growth_bytes"], handle.metrics["host_work_s"]
        plan = setup.plan(prompt)
    memories = [host_memory(plan, r) for r in range(hosts)]
    chunked = dataclasses.replace(plan, chunk_tokens=CHUNK)  # so that whole blocks are compared by the same measure
    streams = [plan.host_plans[r].tokens_run * whole_row_bytes(chunked, r) for r in range(hosts)]
    activations = [g - m["kv"] for g, m in zip(grown, memories, strict=True)]
    return {
        "ok": True,
        "kv_mb": _mb(m["kv"] for m in memories),
        "growth_mb": _mb(grown),
        "stream_mb": _mb(streams),
        "activations_mb": _mb(activations),
        "beside_mb": max(_mb(a - s for a, s in zip(activations, streams, strict=True))),
        "planned_mb": _mb(m["activations"] for m in memories),
        "work_s": [round(w, 2) for w in work],
    }


def _mb(sizes: Iterator[int] | list[int]) -> list[float]:
    return [round(size / 1e6, 1) for size in sizes]


if __name__ == "__main__":
    from bench.report import document
    from launch.torchrun.start import lead

    model, strategy, *numbers = sys.argv[1:]
    hosts, tokens, chunk = map(int, numbers)
    sys.exit(lead(lambda: document(measure(model, strategy, hosts, tokens, chunk or None))))
