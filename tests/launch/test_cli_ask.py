"""``apb ask``: the answer, its document, and what is shown and kept of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config.build import settle
from launch.config.compose import compose
from launch.config.settings import AskSettings
from launch.terminal.display import Display
from launch.verbs.base import VERBS
from launch.verbs.prefill.ask import _caution
from launch.verbs.prefill.prepare import sharing
from tests.support.command import KEYS

pytest_plugins = ("tests.support.command",)


def test_ask(ask: Any, model: Path) -> None:
    ran = ask()
    assert ran.code == 0
    found = ran.document
    assert set(found) >= KEYS
    assert found["model"] == str(model) and found["strategy"] == "apb" and found["cluster"] == "virtual"
    assert found["hosts"] == 4 == len(found["host_work_s"]) and 1 <= len(found["token_ids"]) <= 4
    assert found["bytes_sent"] == sum(found["bytes_by_kind"].values()) > 0
    assert "Answer: " in ran.err and "time to first token" in ran.err
    assert "apb's 4 hosts took turns in one process of 1 thread" in ran.err and "host_work_s" in ran.err


def test_ask_compares_with_full_attention(ask: Any) -> None:
    ran = ask("compare=true", "strategy=star", "cluster.hosts=3", "cluster.threads=1")
    found = ran.document
    other = found["compare"]
    assert set(other) >= KEYS and other["strategy"] == "full" and other["hosts"] == 1
    assert found["speedup"] == other["speedup"] == other["prefill_s"] / found["prefill_s"]
    assert found["strategy"] == "star" and found["hosts"] == 3
    assert found["threads"] == other["threads"] == 1
    assert "to itself and used 1 thread: wall-clock and its speed-up do not compare" in ran.err


@pytest.mark.parametrize(
    ("name", "threads", "device", "words"),
    [
        ("ray", 1, "cpu", "4 hosts shared this machine's 2 cores, 1 thread each"),
        ("ray", 2, "cpu", "compares with cluster.threads=1 only"),
        ("torchrun", 1, "cpu", "3 of apb's 4 hosts shared"),
        ("virtual", 2, "cuda", "took turns in one process of 2 threads"),
        ("ray", 1, "cuda", None),
    ],
)
def test_the_caution_about_times(
    monkeypatch: pytest.MonkeyPatch, name: str, threads: int, device: str, words: str | None
) -> None:
    monkeypatch.setattr("launch.verbs.prefill.ask.cores", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if name == "torchrun":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    found = settle(AskSettings, compose(VERBS.get("ask")().schema(), [f"cluster={name}"]).values)
    metrics = {"strategy": "apb", "hosts": 4, "threads": threads}
    if words is None:
        assert sharing(found, device, 4) == 1
    else:
        assert words in _caution([metrics], found, device)


def test_chunks_answer_the_same(ask: Any) -> None:
    whole = ask("cluster.hosts=3", "chunk_tokens=null").document
    chunked = ask("cluster.hosts=3", "chunk_tokens=16").document
    assert (whole["plan"]["chunk_tokens"], chunked["plan"]["chunk_tokens"]) == (None, 16)
    assert chunked["token_ids"] == whole["token_ids"]
    automatic = ask("cluster.hosts=3", "compare=true").document
    assert automatic["plan"]["chunk_tokens"] is automatic["compare"]["plan"]["chunk_tokens"] is None  # there is room


def test_options_stand_anywhere(apb: Any, model: Path, document: Path) -> None:
    ran = apb("strategy=full", "-q", "Who?", "cluster=virtual", "ask", "-d", str(document), f"model={model}")
    assert ran.code == 0 and ran.document["hosts"] == 1


def test_out_writes_result_configuration_and_log(ask: Any, tmp_path: Path) -> None:
    out = tmp_path / "results, é = 1"
    found = ask(f"out={out}", "strategy.passing_len=3").document
    assert json.loads((out / "result.json").read_text()) == found
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["strategy"]["passing_len"] == 3 and config["out"] == str(out)
    assert "Answer: " in (out / "apb.log").read_text()
    error = ask(f"out={out}", "cluster.hosts=1000").refused("more hosts than context tokens")
    assert json.loads((out / "result.json").read_text())["error"] == error
    assert "more hosts than context tokens" in (out / "apb.log").read_text()


def test_plain_progress_says_how_much_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.terminal.display.PLAIN_PAUSE_S", 0.0)
    with Display().progress() as report:
        for done in range(4):
            report("Prefill", done, 30)
    assert "Prefill: 3 of 30" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_program(model: Path, document: Path, tmp_path: Path) -> None:
    words = ["ask", f"model={model}", "-d", "-", "-q", "Who?", "cluster=virtual", "decode.max_new_tokens=2"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        input=document.read_bytes(),
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert set(json.loads(done.stdout.splitlines()[-1])) >= KEYS
    assert b"Warning" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["document.txt"]
