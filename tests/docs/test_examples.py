"""Every example of the documents runs, on a tiny random model; those of ``burst`` have their test in tests/burst."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apb.compress import COMPRESSORS
from apb.strategies import STRATEGIES
from tests.support.tiny import saved_llama

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run an example as a program and return what it prints; what it registers is forgotten afterwards."""
    for registry in (COMPRESSORS, STRATEGIES):
        registry.names()  # all modules are imported, so that a copy has what they register
        for held in ("_found", "_summaries"):
            monkeypatch.setattr(registry, held, dict(getattr(registry, held)))

    def program(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return program


def test_ask(run: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Nothing to see here. " * 40)
    document = ["--document", str(tmp_path / "text.txt")]
    assert "bytes sent" in run("ask.py", "--model", model, *document, "--question", "What is here?")


def test_fork_question(run: Any, model: str) -> None:
    said = run("fork_question.py", model)
    assert said.count("made for: None") == 2
    assert "(the cache was made for: When does the ferry leave?)" in said


def test_own_compressor(run: Any, model: str) -> None:
    said = run("own_compressor.py", model)
    assert "every_third" in said and "'passing'" in said


def test_own_strategy(run: Any, model: str) -> None:
    assert "sinks: anchors of [0, 32, 32] tokens" in run("own_strategy.py", model)


def test_torchrun_ask(model: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*torchrun, str(EXAMPLES / "torchrun_ask.py"), model], capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("2 hosts\n")
