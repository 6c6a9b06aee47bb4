"""The command of the fidelity benchmark, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.ruler.cli import FILE
from launch.cli import main
from tests.support.tiny import saved_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_llama(tmp_path_factory.mktemp("models") / "tiny")


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code = main(["bench", *words])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def test_the_command_measures_resumes_and_draws(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["ruler", f"model={model}", "cluster.hosts=3", "bench.tokens=1200", f"out={tmp_path}", "bench.samples=2"]
    words += ["bench.tasks=[niah_multikey_1,perplexity]"]
    code, found, err = command(capsys, *words)
    assert code == 0, err
    lines = {(x["task"], x["variant"]): x for x in found["table"]}
    variants = ["full", "full, question first", "apb + random, 3 hosts", "apb + query, 3 hosts"]
    assert set(lines) == {("niah_multikey_1", v) for v in variants} | {
        ("perplexity", v) for v in variants if "first" not in v
    }
    full, needle = lines["niah_multikey_1", "full"], lines["niah_multikey_1", "apb + query, 3 hosts"]
    assert full["kl"] == 0.0 < needle["kl"] and needle["accuracy"] is not None and needle["second_log_prob"] < 0
    assert 0 < needle["flops_share"] < 1 and needle["passing_bytes"] > 0
    assert lines["perplexity", "full"]["perplexity"] == pytest.approx(np.exp(-lines["perplexity", "full"]["log_prob"]))
    assert {c["against"] for c in found["comparisons"]} == {"full", "full, question first", "apb + random, 3 hosts"}
    assert found["plots"] == ["heatmap-1200-report-float32.png", "frontier-1200-report-float32.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in found["plots"])
    assert "Differences in log p" in err

    before = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text("".join(before.splitlines(keepends=True)[:-2]))  # as if killed before the last two
    code, again, _ = command(capsys, *words)
    assert code == 0 and again["table"] == found["table"]
    lines_after = (tmp_path / FILE).read_text().splitlines()
    assert len(lines_after) == len(before.splitlines()) and lines_after[:-2] == before.splitlines()[:-2]


def test_a_sweep_shares_its_baselines(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, err = command(
        capsys,
        *(
            "ruler",
            "-m",
            f"model={model}",
            "cluster.hosts=2",
            "bench.tokens=900",
            "bench.samples=1",
            "bench.tasks=[vt_1hop]",
        ),
        *("bench.decode=false", "compress=norm,recent", f"out={tmp_path}"),
    )
    assert code == 0, err
    assert len(found["runs"]) == 2
    keys = [json.loads(line)["variant"] for line in (tmp_path / FILE).read_text().splitlines()]
    assert sorted(keys) == sorted(
        ["full", "full, question first", *(f"apb + {c}, 2 hosts" for c in ("random", "norm", "recent"))]
    )
    assert {x["accuracy"] for x in found["runs"][1]["table"]} == {None}


def test_an_exact_strategy_is_full_attention(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"model={model}", "cluster.hosts=2", "bench.tokens=600", "bench.samples=1", "bench.tasks=[vt_1hop]")
    code, found, err = command(capsys, "ruler", "strategy=ring", *words)
    assert code == 0, err
    (ring,) = (x for x in found["table"] if x["variant"] == "ring, 2 hosts")
    assert abs(ring["less_full"]) < 1e-5 and abs(ring["kl"]) < 1e-6 and ring["passing_bytes"] > 0


def test_a_question_asked_afterwards_is_unknown_to_the_prefill(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("ruler", f"model={model}", "cluster.hosts=2", "bench.tokens=600", "bench.samples=1", f"out={tmp_path}")
    words = (*words, "bench.tasks=[vt_1hop]", "bench.decode=false", "bench.plain=true")
    code, found, err = command(capsys, *words, "strategy=ring")
    assert code == 0, err
    (ring,) = (x for x in found["table"] if x["variant"] == "ring, 2 hosts, question not known")
    assert abs(ring["less_full"]) < 1e-5 and abs(ring["kl"]) < 1e-6
    code, found, err = command(capsys, *words, "strategy=apb", "compress=norm")
    assert code == 0, err
    names = {f"apb + {c}, 2 hosts, question not known" for c in ("random", "norm")}
    assert names < {x["variant"] for x in found["table"]}
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    apb = next(r for r in rows if r["variant"] in names)
    assert apb["kl"] > 0
    _, found, _ = command(capsys, *words, "strategy=apb", "compress=query")
    assert "needs a question" in found["error"]["message"]
    _, found, _ = command(capsys, *words, "bench.question_first=true")
    assert "bench.plain" in found["error"]["message"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rular"], "ruler"),
        (["ruler", "bench.samples=0"], "bench.samples"),
        (["ruler", "bench.seeds=chose"], "choose"),
        (["ruler", "bench.tasks=[vtt]"], "vt"),
        (["ruler", "bench.flops=2"], "share of full"),
        (["ruler", "bench.flops=star", "strategy=star", "bench.tasks=[vt_1hop]"], "no lengths"),
        (["ruler", "bench.tasks=[cwe]", "bench.tokens=500"], "does not fit"),
        (["ruler", "bench.data=/no/such/file"], "no RULER samples"),
        (["ruler", "strategy=full", "cluster.hosts=2", "bench.tasks=[vt_1hop]"], "runs on one host"),
        (["ruler", "bench.tasks=[vt_1hop]", "bench.tokens=70000"], "longer than the model's context"),
    ],
)
def test_mistakes_are_named(words: list[str], says: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = command(capsys, *words, f"model={model}", "bench.decode=false")
    assert code == 2 and says in " ".join(found["error"].values()), found


def test_a_benchmark_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = command(capsys)
    assert code == 2 and found["error"]["remedy"] == "Write 'apb bench attention', for example."
