"""star and apb against their dense masked twins on the real model, on every kind of cluster; and the byte ledger."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from apb.host.host import load_adapter
from bench.twin import twin
from bench.verify.full import document_text
from bench.verify.runner import Recorder

LENGTHS, HOSTS, STRATEGIES = (997, 2203), range(1, 9), ("star", "apb", "spava")
CLUSTERS = ("virtual", "gloo", "ray")
LOGITS_ATOL = 1e-4
QUESTION = "Which statement binds names to objects?"

Found = dict[str, tuple[Tensor, bool]]  # by "strategy/length": the logits, and whether ledger and plan agree


def check(recorder: Recorder, model: str) -> dict[str, Any]:
    """Compare the next token's logits for every strategy, length, number of hosts and cluster."""
    oracle = Setup.make(EngineOptions(model, device="cpu", dtype="float32"))
    adapter = load_adapter(oracle.spec)

    def rotate(x_HSD: Tensor, delta: int, layer: int) -> Tensor:
        return adapter.rotate(x_HSD[None], delta, layer)[0]

    for hosts in HOSTS:
        keys = {(c, s, n): f"twins/{c}/{hosts}/{s}/{n}" for c in CLUSTERS for s in STRATEGIES for n in LENGTHS}
        if all(key in recorder.done for key in keys.values()):
            continue
        want: dict[str, Tensor] = {}
        for strategy, tokens, setup in _settings(model, hosts):
            prompt = setup.prompt(_ids(setup, tokens), QUESTION)
            select = "query" if setup.compressor is not None else None
            want[f"{strategy}/{tokens}"] = twin(adapter, rotate, prompt, strategy, hosts, select=select).logits
        for name in CLUSTERS:
            found = _gloo(model, hosts) if name == "gloo" else _engines(model, hosts, name)
            for strategy in STRATEGIES:
                for tokens in LENGTHS:
                    case = f"{strategy}/{tokens}"
                    recorder.sample(keys[name, strategy, tokens], _compare(found[case], want[case]))
    rows = list(recorder.rows("twins/"))
    return {
        "ok": all(row["ok"] for row in rows),
        "compared": len(rows),
        "max_logits_error": max(row["logits_error"] for row in rows),
        "ledger_equals_plan": all(row["ledger_equals_plan"] for row in rows),
    }


def _settings(model: str, hosts: int) -> Iterator[tuple[str, int, Setup]]:
    for strategy in STRATEGIES:
        setup = Setup.make(
            EngineOptions(model, hosts=hosts, strategy=strategy, device="cpu", dtype="float32", threads=1)
        )
        for tokens in LENGTHS:
            yield strategy, tokens, setup


def _ids(setup: Setup, tokens: int) -> list[int]:
    """A document such that the context, template head included, has ``tokens`` tokens."""
    ids: list[int] = setup.tokenizer(document_text(), add_special_tokens=False)["input_ids"]
    head = setup.prompt(ids[:1], QUESTION).lengths.head
    return ids[5000 : 5000 + tokens - head]


def _compare(found: tuple[Tensor, bool], want: Tensor) -> Callable[[], dict[str, Any]]:
    logits, books = found
    error = (logits - want).abs().max().item()
    return lambda: {"ok": error <= LOGITS_ATOL and books, "logits_error": error, "ledger_equals_plan": books}


def _engines(model: str, hosts: int, cluster: str) -> Found:
    found: Found = {}
    for strategy, tokens, setup in _settings(model, hosts):
        if tokens == LENGTHS[0]:
            engine = Engine.launch(setup, cluster=cluster)
        handle = engine.prefill(_ids(setup, tokens), QUESTION)
        metrics = handle.metrics
        books = metrics["bytes_by_kind"] == metrics["plan"]["bytes_by_kind"]
        found[f"{strategy}/{tokens}"] = handle.logits(), books
        if tokens == LENGTHS[-1]:
            engine.close()
    return found


def _gloo(model: str, hosts: int) -> Found:
    """The same under torchrun, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={hosts}"]
        command += ["-m", "bench.verify.twins", model, str(hosts), str(out)]
        subprocess.run(command, check=True, capture_output=True, timeout=1200)
        found: Found = torch.load(out)
        return found


if __name__ == "__main__":
    from launch.torchrun.start import lead

    _, given_model, given_hosts, path = sys.argv
    sys.exit(lead(lambda: torch.save(_engines(given_model, int(given_hosts), "torchrun"), path)))
