"""The parts of the GPU check in order, and what they must reach. Every part is a row: a stopped run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apb.decode.eagle2 import Eagle2
from bench.gpu.parts import DTYPE, MODEL, attention, conf, merge
from bench.gpu.steps import Stand
from bench.tools.rows import RowStore

CONTEXTS = (1_024, 32_768, 131_072)  # of decode steps
# What emulated hosts must reach: how many times faster than another strategy.
LEAST = {
    "apb": {"full": 11.0, "ring": 1.4, "star": 1.3},
    "spava": {"full": 15.0, "ring": 1.9, "star": 1.8},
}
LINEAR, ATTENTION = 0.85, 0.9  # of the device's own rates, at the same shapes and on the whole causal sequence
STEP_GAIN = 1.10  # of drafting from a quarter of the ids, by step times
COMMAND_S = 1800  # deadline of a part that is a command


def check(rows: RowStore) -> dict[str, Any]:
    """Run all parts that have no row yet and return what the rows say together."""
    rows.sample("gpu/tests", _tests)
    rows.sample("gpu/merge", merge)
    rows.sample("gpu/attention", attention)
    rows.sample("gpu/kernels", lambda: _part("kernels"))
    rows.sample("gpu/emulate", lambda: judge(_part("emulate")))
    _steps(rows)
    found = rows.under("gpu/")
    step_rows = {row["key"]: row for row in found if row["key"].startswith("gpu/steps/")}
    gains = {str(n): gain(step_rows, n) for n in CONTEXTS}
    return {
        "ok": all(row["ok"] for row in found) and gains[str(CONTEXTS[0])]["vocabulary"] >= STEP_GAIN,
        "device": torch.cuda.get_device_name(),
        "missed": {row["key"]: row["missed"] for row in found if row.get("missed")},
        "step_gains": gains,
        "least_step_gain": STEP_GAIN,
    }


def _tests() -> dict[str, Any]:
    """Run the tests marked ``gpu``, of the files that have some: others may import what is not installed here."""
    root = Path(__file__).parents[2]
    files = [str(f) for f in sorted((root / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_S, cwd=root)
    lines = ran.stdout.strip().splitlines() or ["no output"]
    return {"ok": ran.returncode == 0, "summary": lines[-1], "failures": [x for x in lines if x.startswith("FAILED")]}


def _part(name: str) -> dict[str, Any]:
    """Run a part in a process of its own and return its document; ``ok`` is false where it fails."""
    command = [sys.executable, "-m", "bench.gpu", "--part", name]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_S)
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        return {"ok": False, "error": ran.stderr[-2000:]}
    document: dict[str, Any] = json.loads(lines[-1])
    return document


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
    return {"ok": not missed, "missed": missed, **document}


def _steps(rows: RowStore) -> None:
    shape = conf("model", MODEL)["config"]
    stand: list[Stand] = []

    def measured(context: int, vocab: int | None, graphs: bool) -> dict[str, Any]:
        if not stand:  # only when something is left to measure
            stand.append(Stand(shape, DTYPE, "cuda"))
        return {"ok": True, **stand[0].measure(context, vocab, graphs, Eagle2())}

    for context in CONTEXTS:
        for graphs in (True, False):
            for vocab in (None, shape["vocab_size"] // 4):
                key = step_key(context, vocab is None, graphs)
                rows.sample(key, lambda c=context, v=vocab, g=graphs: measured(c, v, g))  # type: ignore[misc]


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
