"""Measurements inside torchrun, one process a host: started by ``torchrun``, answered through a file."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from apb.plan.memory import host_memory, whole_row_bytes
from bench.tools.prose import reference

QUESTION = "Which statement binds names to objects?"
TWINS, TWIN_LENGTHS = ("star", "apb", "spava"), (997, 2203)
MEASURED_CHUNK = 256  # tokens; whole blocks are compared by what chunks of so many leave whole
DEADLINE_S = 1200
ROOT = Path(__file__).parents[2]


def torchrun(hosts: int, what: str, *given: object) -> Any:
    """Run a function of this file on the first of ``hosts`` gloo processes and return what it returns."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={hosts}"]
        command += ["-m", __name__, str(out), what, str(hosts), *map(str, given)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return torch.load(out)


def on_cpu(model: str, **options: Any) -> Setup:
    """Return a setup on this machine's processor, in float32 unless ``options`` say otherwise."""
    return Setup.make(EngineOptions(model, **({"device": "cpu", "dtype": "float32"} | options)))


def document(setup: Setup, tokens: int) -> list[int]:
    """Return a document whose context, template head included, has ``tokens`` tokens."""
    ids: list[int] = setup.tokenizer(reference(), add_special_tokens=False)["input_ids"]
    head = setup.prompt(ids[:1], QUESTION).lengths.head
    return ids[5000 : 5000 + tokens - head]


def twins(hosts: int, model: str, cluster: str = "torchrun") -> dict[str, tuple[torch.Tensor, bool]]:
    """Return the next token's logits by strategy and length, and whether the ledger is the plan's."""
    found = {}
    for strategy in TWINS:
        setup = on_cpu(model, hosts=hosts, strategy=strategy)
        with Engine.launch(setup, cluster=cluster) as engine:
            for tokens in TWIN_LENGTHS:
                handle = engine.prefill(document(setup, tokens), QUESTION)
                books = handle.metrics["bytes_by_kind"] == handle.metrics["plan"]["bytes_by_kind"]
                found[f"{strategy}/{tokens}"] = handle.logits(), books
                handle.release()
    return found


def memory(hosts: int, model: str, strategy: str, tokens: int, chunk: int) -> dict[str, Any]:
    """Return how a process grows by a prefill after a short one: MB, by host; ``chunk`` 0 is all at once.

    ``beside_mb``: the most over KV and over what stays whole when a block runs in chunks.
    """
    setup = on_cpu(model, hosts=hosts, strategy=strategy, chunk_tokens=chunk or None)
    with Engine.launch(setup, cluster="torchrun") as engine:
        engine.prefill(document(setup, 80), QUESTION).release()
        prompt = setup.prompt(document(setup, tokens), QUESTION)
        handle = engine.prefill(prompt)
        grown, work = handle.metrics["host_rss_growth_bytes"], handle.metrics["host_work_s"]
        plan = setup.plan(prompt)
    memories = [host_memory(plan, r) for r in range(hosts)]
    chunked = dataclasses.replace(plan, chunk_tokens=MEASURED_CHUNK)
    streams = [plan.host_plans[r].tokens_run * whole_row_bytes(chunked, r) for r in range(hosts)]
    over_kv = [g - m["kv"] for g, m in zip(grown, memories, strict=True)]
    return {
        "hosts": hosts,
        "tokens": tokens,
        "kv_mb": _mb(m["kv"] for m in memories),
        "growth_mb": _mb(grown),
        "over_kv_mb": _mb(over_kv),
        "beside_mb": max(_mb(a - s for a, s in zip(over_kv, streams, strict=True))),
        "planned_mb": _mb(m["activations"] for m in memories),
        "work_s": [round(w, 2) for w in work],
    }


def _mb(sizes: Iterable[float]) -> list[float]:
    return [round(size / 1e6, 1) for size in sizes]


MEASURES: dict[str, Callable[..., Any]] = {"twins": twins, "memory": memory}

if __name__ == "__main__":
    from launch.torchrun.start import lead

    path, name, *words = sys.argv[1:]
    arguments = [int(word) if word.isdigit() else word for word in words]
    sys.exit(lead(lambda: torch.save(MEASURES[name](*arguments), path)))
