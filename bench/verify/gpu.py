"""What one GPU of 80 GB or more can say about the GPU path, in one go: tests, kernels, emulated hosts, decode steps.

At Llama-3.1-8B's shape with random weights, bfloat16. Every part is a sample: a run that was stopped goes on. Times in
seconds; nothing here says anything about what is attended to.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import burst.kernels.merge as merging
from apb.decode.eagle2 import Eagle2
from bench.timing import median_s
from bench.verify.runner import Recorder
from bench.verify.steps import Stand
from burst.kernels import flash_attn, kernel
from burst.kernels.merge import Accumulator

MODEL = "llama3.1-8b-shape"
TOKENS, HOSTS = 131_072, 8
CONTEXTS = (1_024, 32_768, 131_072)  # of decode steps
# What emulated hosts must reach: how many times faster than another strategy.
LEAST = {
    "apb": {"full": 11.0, "ring": 1.4, "star": 1.3},
    "spava": {"full": 15.0, "ring": 1.9, "star": 1.8},
}
LINEAR, ATTENTION = 0.85, 0.9  # of the device's own rates, at the same shapes and on the whole causal sequence
STEP_GAIN = 1.10  # of drafting from a quarter of the ids, by step times
COMMAND_S = 1800  # deadline of a part that is a command


def check(recorder: Recorder, model: str) -> dict[str, Any]:
    """Run all parts; ``model`` is not asked: weights are random."""
    recorder.sample("gpu/tests", _tests)
    recorder.sample("gpu/merge", _merge)
    recorder.sample("gpu/attention", _attention)
    recorder.sample("gpu/kernels", lambda: _kernels(_bench("kernels", "bench.tokens=[1024,16384,131072]")))
    emulated = ("network=nvlink", f"bench.tokens={TOKENS}", f"bench.warmup_tokens={TOKENS}", "bench.query_tokens=64")
    names = "bench.strategies=[full,ring,star,apb,spava]"
    recorder.sample("gpu/emulate", lambda: judge(_bench("emulate", *emulated, names, f"bench.hosts={HOSTS}")))
    _steps(recorder)
    rows = list(recorder.rows("gpu/"))
    step_rows = {row["key"]: row for row in rows if row["key"].startswith("gpu/steps/")}
    gains = {str(n): gain(step_rows, n) for n in CONTEXTS}
    return {
        "ok": all(row["ok"] for row in rows) and gains[str(CONTEXTS[0])]["vocabulary"] >= STEP_GAIN,
        "device": torch.cuda.get_device_name(),
        "missed": {row["key"]: row["missed"] for row in rows if row.get("missed")},
        "step_gains": gains,
        "least_step_gain": STEP_GAIN,
    }


def _tests() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_S)
    lines = ran.stdout.strip().splitlines() or ["no output"]
    return {"ok": ran.returncode == 0, "summary": lines[-1], "failures": [x for x in lines if x.startswith("FAILED")]}


def _merge() -> dict[str, Any]:
    """Time the merge of a block's output in bfloat16 into its sums, fused and by torch; beside the bytes' own time."""
    rows, heads, dim = TOKENS // HOSTS, 32, 128
    with torch.inference_mode():
        out, part = (torch.randn(1, heads, rows, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        lse, part_lse = (torch.randn(1, heads, rows, device="cuda") for _ in range(2))

        def run() -> None:
            total = Accumulator()
            total.add(out, lse)
            total.add(part, part_lse)
            total.finish(out.dtype)

        fused = median_s(run, "cuda", repeats=20)
        has_triton, merging._has_triton = merging._has_triton, lambda: False  # type: ignore[assignment]
        try:
            plain = median_s(run, "cuda", repeats=20)
        finally:
            merging._has_triton = has_triton
    return {"ok": has_triton() and fused < plain, "fused_s": fused, "torch_s": plain, "bytes": 3 * out.numel() * 2}


def _attention() -> dict[str, Any]:
    """Time one causal call of the whole context by every kernel; the one that ``auto`` takes must be the fastest."""
    heads, kv_heads, dim = 32, 8, 128
    rates: dict[str, float] = {}
    with torch.inference_mode():
        q, k, v = (
            torch.randn(1, n, TOKENS, dim, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
        )
        for name in ("cuda", "cudnn", "flash_attn"):
            if name == "flash_attn" and flash_attn.best(q.device) is None:
                continue
            seconds = median_s(lambda name=name: kernel(name)(q, k, v, causal=True), "cuda")  # type: ignore[misc]
            rates[name] = 4 * dim * heads * (TOKENS * (TOKENS + 1) // 2) / seconds
    chosen = kernel("auto", q.device, q.dtype).name
    missed = [
        f"'{name}' runs at {rate / rates[chosen]:.2f} of '{chosen}', which 'auto' takes"
        for name, rate in rates.items()
        if rate > 1.05 * rates[chosen]
    ]
    return {"ok": not missed, "missed": missed, "flops_per_s": rates, "auto": chosen}


def _bench(name: str, *settings: str) -> dict[str, Any]:
    """Run ``apb bench NAME`` at the model's shape and return its document."""
    command = [sys.executable, "-m", "launch.cli", "bench", name, f"model={MODEL}", "bench.dtype=bfloat16"]
    ran = subprocess.run([*command, *settings], capture_output=True, text=True, check=False, timeout=COMMAND_S)
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        return {"error": ran.stderr[-2000:]}
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def _kernels(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"ok": "error" not in document, **document}


def judge(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the emulation's numbers beside what they must reach, and what they miss."""
    if "error" in document:
        return {"ok": False, "missed": [document["error"]]}
    ratios = {name: value["median"] for name, value in document["ratios"].items()}
    shares = document["baseline"]["shares"]
    missed = [
        f"{name} over {other}: {ratios[f'{name} over {other}']:.2f}, not {least}"
        for name, others in LEAST.items()
        for other, least in others.items()
        if ratios[f"{name} over {other}"] < least
    ]
    if shares["full"]["linear"] < LINEAR:
        missed.append(f"full's projections at {shares['full']['linear']:.2f} of their rate, not {LINEAR}")
    missed += [
        f"{name}'s attention at {share['attention']:.2f} of one causal call's rate, not {ATTENTION}"
        for name, share in shares.items()
        if share["attention"] < ATTENTION
    ]
    kept = ("tokens", "rows", "ratios", "limits", "baseline", "hardware", "command")
    return {"ok": not missed, "missed": missed, **{key: document[key] for key in kept if key in document}}


def _steps(recorder: Recorder) -> None:
    shape = yaml.safe_load((Path(__file__).parents[2] / "conf" / "model" / f"{MODEL}.yaml").read_text())["config"]
    stand: list[Stand] = []

    def measured(context: int, vocab: int | None, graphs: bool) -> dict[str, Any]:
        if not stand:  # only when something is left to measure
            stand.append(Stand(shape, "bfloat16", "cuda"))
        return {"ok": True, **stand[0].measure(context, vocab, graphs, Eagle2())}

    for context in CONTEXTS:
        for graphs in (True, False):
            for vocab in (None, shape["vocab_size"] // 4):
                key = step_key(context, vocab is None, graphs)
                recorder.sample(key, lambda c=context, v=vocab, g=graphs: measured(c, v, g))  # type: ignore[misc]


def step_key(context: int, everything: bool, graphs: bool) -> str:
    """Return the name of a sample of steps."""
    return f"gpu/steps/{context}/{'all ids' if everything else 'a quarter'}/{'graphs' if graphs else 'eager'}"


def gain(rows: Mapping[str, Mapping[str, Any]], context: int) -> dict[str, float]:
    """Return how much faster a step is for drafting from a quarter of the ids, and for graphs."""

    def median(everything: bool, graphs: bool) -> float:
        return float(rows[step_key(context, everything, graphs)]["step_s"]["median"])

    return {
        "vocabulary": median(True, True) / median(False, True),
        "graphs": median(False, False) / median(False, True),
    }
