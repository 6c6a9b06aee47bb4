"""The check of the GPU path: what of it can be tested without one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from apb.decode.eagle2 import Eagle2
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from bench.gpu import parts
from bench.gpu.__main__ import main
from bench.gpu.check import _part, gain, judge, step_key
from bench.gpu.steps import STEPS, Stand

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def test_steps_are_timed_over_a_cache_of_random_rows() -> None:
    stand = Stand(CONFIG, "float32", "cpu")
    whole, quarter = (stand.measure(700, v, True, Eagle2(depth=3, width=3, tokens=8), repeats=1) for v in (None, 75))
    assert (whole["vocab"], quarter["vocab"]) == (300, 75)
    for row in (whole, quarter):
        assert row["context"] == 700 and row["tree"] == 8 and not row["graphs"], "there are no graphs on a CPU"
        assert row["step_s"]["n"] == STEPS - 1 and row["step_s"]["median"] > 0
        assert 1 <= row["accepted_length"] < 2, "random heads guess next to nothing"


def emulated(**changes: float) -> dict[str, Any]:
    names = ("full", "ring", "star", "apb", "spava")
    ratios = {f"{a} over {b}": {"median": 99.0} for a in names for b in names if a != b}
    ratios |= {name: {"median": value} for name, value in changes.items() if " over " in name}
    shares = {name: {"linear": 0.9, "attention": changes.get(f"{name} attention", 0.95)} for name in names}
    shares["full"]["linear"] = changes.get("linear", 0.9)
    return {"tokens": 1, "ratios": ratios, "baseline": {"shares": shares}, "rows": []}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"apb over full": 10.9}, "apb over full: 10.90, not 11.0"),
        ({"spava over ring": 1.8}, "spava over ring: 1.80, not 1.9"),
        ({"linear": 0.8}, "projections at 0.80"),
        ({"star attention": 0.85}, "star's attention at 0.85"),
    ],
)
def test_misses_are_named(changes: dict[str, float], words: str | None) -> None:
    found = judge(emulated(**changes))
    assert found["ok"] == (words is None)
    assert found["missed"] == [] if words is None else len(found["missed"]) == 1 and words in found["missed"][0]


def test_parts_run_and_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions("tiny", hosts=1, strategy="full", dtype="float32", device="cpu")
    monkeypatch.setattr(parts, "_setup", lambda: Setup.make(options, config=CONFIG))
    for name, value in (("TOKENS", 140), ("HOSTS", 2), ("KERNEL_TOKENS", (16,))):
        monkeypatch.setattr(parts, name, value)
    assert parts.kernels()["rows"][0]["seconds"] > 0
    found = judge(parts.emulated())
    assert found["tokens"] == 140 and {row["strategy"] for row in found["rows"]} == set(parts.STRATEGIES)
    assert any("apb over full" in miss for miss in found["missed"])  # not at this size


def test_a_command_that_fails_is_told() -> None:
    assert judge({"error": "no GPU"}) == {"ok": False, "missed": ["no GPU"]}


def test_gains_compare_equal_things() -> None:
    rows = {
        step_key(1024, everything, graphs): {"step_s": {"median": seconds}}
        for everything, graphs, seconds in (
            (True, True, 6.0),
            (False, True, 5.0),
            (True, False, 9.0),
            (False, False, 8.0),
        )
    }
    assert gain(rows, 1024) == {"vocabulary": 1.2, "graphs": 1.6}


def test_parts_are_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout='a table\n{"tokens": 1}\n', stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert _part("emulate") == {"tokens": 1}
    assert asked[0][1:] == ["-m", "bench.gpu", "--part", "emulate"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "needs a CUDA device" in capsys.readouterr().err


def test_it_needs_neither_ray_nor_hydra() -> None:
    code = "import sys, bench.gpu.__main__, bench.gpu.parts as p; p.Network(**p.conf('network', 'nvlink'));"
    code += "print(*sorted({'ray', 'hydra', 'omegaconf', 'rich', 'launch'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split() == []
