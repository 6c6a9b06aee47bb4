"""``apb bench attention``: rows, bytes and errors of a small run, what is refused, and the peers' processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.attention import peers
from bench.attention.case import AttentionSettings
from bench.attention.run import rows
from bench.tools import output
from launch.cli import main

SMALL = ("bench.tokens=96", "bench.ranks=3", "bench.repeats=2", "bench.warmup=0")
OURS = ("ring", "double_ring", "burst", "allgather", "ulysses")


def settings(**changes: Any) -> AttentionSettings:
    small = {"tokens": 96, "ranks": 2, "repeats": 2, "warmup": 0, "device": "cpu"}
    return AttentionSettings(name="attention", **(small | changes)).checked()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code = main(["bench", *words])
    captured = capsys.readouterr()
    document: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
    return code, document, captured.err


@pytest.mark.parametrize("backward", ["true", "false"])
def test_a_small_run(capsys: pytest.CaptureFixture[str], backward: str) -> None:
    code, document, err = run(capsys, "attention", *SMALL, "bench.device=cpu", f"bench.backward={backward}")
    found = {row["name"]: row for row in document["rows"]}
    assert code == 0 and set(OURS) < set(found)
    assert 0 < found["dense, one call"]["error"] < 1e-5
    for name in OURS:
        row = found[name]
        assert row["error"] < 1e-5 and row["sent_bytes"] == row["formula_bytes"] > 0
        low, high = row["percent_of_ideal_spread"]
        assert 0 < low <= row["percent_of_ideal"] <= high
        assert row["percent_with_communication"] <= row["percent_of_ideal"] and row["modelled_exposed_s"] >= 0
        assert name in err
    assert "head groups" in found["usp"]["not_run"] and "usp: not run" in err  # three ranks have no divisor
    # Each of three ranks sends two blocks of K and V; backward also three of their gradients; 2 heads of 64.
    passes = 2 if backward == "false" else 2 + 2 + 3
    assert found["ring"]["sent_bytes"] == 3 * passes * (96 // 3) * 2 * 2 * 64 * 4
    assert {"commit", "versions", "cpu", "cores", "date"} <= set(document["conditions"])
    assert document["settings"]["repeats"] == 2 and document["settings"]["dtype"] == "float32"


def test_peers_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = settings()
    assert {peers.not_run(name, asked) for name in peers.PEERS} == {"needs a GPU"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert peers.not_run("ring-flash-attn", asked) == "needs 2 GPUs, one a rank"


def test_a_peer_that_fails_is_a_row_and_not_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, asked: AttentionSettings) -> dict[str, Any]:
        if name.startswith("torch"):
            raise RuntimeError("no such\nkernel")
        return {"seconds": 2.0, "seconds_spread": [1.0, 3.0]}

    monkeypatch.setattr("bench.attention.run.not_run", lambda name, asked: "")
    monkeypatch.setattr("bench.attention.run.measure", fail)
    told: list[str] = []
    found = {row["name"]: row for row in rows(settings(backward=False), told.append)}
    assert found["torch context_parallel"]["not_run"] == "RuntimeError: no such"
    ideal = found["dense, one call"]["seconds"] / 2
    assert math.isclose(found["ring-flash-attn"]["percent_with_communication"], 100 * ideal / 2.0)


def test_ranks_in_processes_are_timed() -> None:
    found = peers.measure("ours, a GPU a rank", settings(warmup=1))
    low, high = found["seconds_spread"]
    assert 0 < low <= found["seconds"] <= high


def test_results_are_kept_with_their_date(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(output, "RESULTS", tmp_path / "results")
    code, document, _ = run(capsys, "attention", *SMALL, "bench.backward=false", "bench.save=true")
    (kept,) = (tmp_path / "results").iterdir()
    assert code == 0 and kept.name == f"{document['conditions']['date']}-attention.json"
    assert json.loads(kept.read_text()) == document


@pytest.mark.parametrize(
    "words, told",
    [
        ((), "no benchmark named"),
        (("retention",), "attention"),
        (("attention", "bench.tokens=0"), "bench.tokens"),
        (("attention", "bench.warmup=-1"), "bench.warmup"),
        (("attention", "bench.q_heads=7"), "bench.kv_heads"),
        (("attention", "bench.layout=sideways"), "zigzag"),
        (("attention", "bench.dtype=int8"), "bfloat16"),
        (("attention", "bench.device=abacus"), "cpu"),
        (("attention", "tokens=5"), "bench.tokens"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str) -> None:
    code, document, _ = run(capsys, *words)
    assert code == 2 and told in " ".join(document["error"].values())
