"""``-m``: one run after another, one document for all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from burst.errors import HostFailure
from tests.support.command import KEYS

pytest_plugins = ("tests.support.command",)


def test_a_sweep_keeps_what_succeeded(ask: Any, tmp_path: Path) -> None:
    ran = ask("-m", "strategy=full,star,apb", "cluster.hosts=range(1,3)", f"out={tmp_path}/out")
    runs = ran.document["runs"]
    varied = [r["overrides"][-3:-1] for r in runs]
    assert varied == [[f"strategy={s}", f"cluster.hosts={h}"] for s in ("full", "star", "apb") for h in (1, 2)]
    failed = [r for r in runs if "error" in r]
    assert ran.code == 2 and len(failed) == 1 and "runs on one host" in failed[0]["error"]["message"]
    assert all(set(r) >= KEYS for r in runs if "error" not in r)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0", "1", "2", "3", "4", "5"]
    assert "error" in json.loads((tmp_path / "out" / "1" / "result.json").read_text())


def test_a_sweep_over_models_and_of_one(apb: Any, model: Path, document: Path) -> None:
    common = ("ask", "-m", "-d", str(document), "-q", "Who?", "cluster=virtual", "decode.max_new_tokens=2")
    (only,) = apb(*common, f"model={model}").document["runs"]  # its path has commas
    assert only["model"] == str(model)
    ran = apb(*common, "model=/nowhere/a,/nowhere/b")
    asked = [r["overrides"][-1] for r in ran.document["runs"]]
    assert ran.code == 2 and asked == ["model=/nowhere/a", "model=/nowhere/b"]


def test_the_worst_exit_code_wins(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise HostFailure("it died", rank=0, step="start")

    monkeypatch.setattr("launch.verbs.prefill.ask.Engine.launch", fail)
    assert ask("-m", "strategy=full,apb", "cluster.hosts=4").code == 1


def test_standard_input_serves_every_run(ask: Any, monkeypatch: pytest.MonkeyPatch, document: Path) -> None:
    with document.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        ran = ask("-m", "-d", "-", "strategy=full,star", "decode.max_new_tokens=1")
    assert ran.code == 0 and len({r["context_tokens"] for r in ran.document["runs"]}) == 1
