"""Throughput, emulation, simulation, kernels and the report on tiny models: what rows say, what is kept and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from apb.compress import compressor
from apb.costs import assumed
from apb.strategies import strategy
from bench.emulate.real import PinnedCluster
from bench.report.cli import BEGIN, END, splice
from bench.report.rows import Row, read
from bench.ruler.plots import comparable
from bench.ruler.summary import table
from bench.simulate.grid import crossings, replicas
from bench.tools import output
from bench.tools.prompts import lengths
from bench.tools.timing import ratio, spread
from burst.errors import UserError
from launch.verbs.prefill.prepare import cores
from tests.launch.test_json_keys import new_and_missing
from tests.support.tiny import tiny_llama

pytest_plugins = ("tests.support.command",)

TINY = (
    "model=llama3.1-8b-shape",
    *(f"model.config.{key}" for key in ("hidden_size=64", "intermediate_size=96", "num_hidden_layers=3")),
    *(f"model.config.{key}" for key in ("num_attention_heads=4", "num_key_value_heads=2", "head_dim=16")),
    "model.config.vocab_size=300",
)
CPU = ("bench.device=cpu", "bench.dtype=float32")
EMULATE = ("bench", "emulate", *TINY, *CPU, "bench.hosts=3", "bench.tokens=200", "bench.warmup_tokens=80")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where dated rows go."""
    monkeypatch.setattr(output, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def kept(results: Path, kind: str) -> list[dict[str, Any]]:
    (file,) = results.glob(f"*-{kind}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def selected(name: str) -> list[int]:
    """Return the rows that each host selects under EMULATE."""
    compress = compressor("query") if strategy(name).takes_compressor else None
    shape, hosts = tiny_llama(torch.float32).shape, 1 if name == "full" else 3
    return [host.kept_rows for host in strategy(name).plan(lengths(200, 24), hosts, shape, compress).host_plans]


def test_emulated_rows_and_their_report(apb: Any, results: Path, tmp_path: Path) -> None:
    ran = apb(
        *EMULATE,
        "bench.repeats=2",
        "bench.strategies=[full,ring,apb,spava,ulysses]",
        "bench.save=true",
        f"out={tmp_path}/out",
    )
    rows = {row["strategy"]: row for row in ran.document["rows"]}
    assert ran.code == 0 and set(rows) == {"full", "ring", "apb", "spava", "ulysses"}
    for name, row in rows.items():
        assert row["emulated"] and row["hosts"] == (1 if name == "full" else 3)
        assert row["best_s"]["median"] <= row["ordered_s"]["median"] <= row["seconds"]["median"]
        assert min(row["idle_s"]) >= 0 and row["exposed_s"]["median"] >= 0
        host = row["slowest_host"]
        assert sum(host[part] for part in ("linear", "attention", "selection", "other")) == pytest.approx(
            max(row["work_s"])
        )
        assert host["linear"] > 0 and host["attention"] > 0
        # Whichever host was slowest: some select nothing.
        assert (host["selection"] > 0) == (selected(name)[host["rank"]] > 0)
        assert all(rate > 0 for rate in row["rates"].values())
    assert rows["ring"]["bytes_by_link"] == {"inter": sum(rows["ring"]["bytes_by_kind"].values())}
    over = ran.document["ratios"]["apb over full"]
    assert over["n"] == 2 and over["iqr"][0] <= over["median"] <= over["iqr"][1]
    limits = ran.document["limits"]
    assert limits["full"]["equal_rates"] == 1.0 and 1 < limits["apb"]["equal_rates"] < 6
    assert (
        "EMULATED" in ran.err
        and "Baseline full" in ran.err
        and ran.document["files"] == ["traces.json", "gantt.png", "rates.json"]
    )
    traces = json.loads((tmp_path / "out" / "traces.json").read_text())
    assert len(traces["ring"]) == 3 and (tmp_path / "out" / "gantt.png").stat().st_size > 1000
    saved = kept(results, "emulate")
    assert [row["strategy"] for row in saved] == list(rows)
    assert {"commit", "hardware", "versions", "configuration", "command", "date"} <= set(saved[0])
    assert saved[0]["command"].startswith("apb bench emulate model=llama3.1-8b-shape")

    simulate = ("bench", "simulate", "model=llama3.1-8b-shape", "bench.tokens=[32768,131072]", "bench.hosts=[4,8]")
    assert apb(*simulate, "bench.save=true").code == 0
    readme, figure = tmp_path / "README.md", tmp_path / "figure.svg"
    readme.write_text("before\n<!-- results -->\nstale\n<!-- /results -->\nafter\n")
    ran = apb("bench", "report", f"bench.readme={readme}", f"bench.figure={figure}", "bench.growth_hosts=[2,4]")
    text = readme.read_text()
    assert ran.code == 0 and ran.document["rows"] == {
        "emulate": 5,
        "simulate": 34,
        "throughput": 0,
        "decode": 0,
        "ruler": 0,
    }
    assert text.startswith("before") and text.endswith("after\n") and "stale" not in text
    assert f"{over['median']:.2f}" in text and saved[0]["command"] in text and "**Emulated**" in text
    assert figure.read_text().startswith("<?xml") and "Decoders" not in text
    assert "![Speed-ups, where the time goes, time over tokens, time over hosts](figure.svg)" in text
    report = ("bench", "report", f"bench.readme={readme}", f"bench.figure={figure}", "bench.growth_hosts=[2,4]")
    assert apb(*report).code == 0 and readme.read_text() == text


def test_the_committed_results_are_those_of_the_committed_rows(apb: Any) -> None:
    page = Path(__file__).parents[2] / "docs" / "results.md"
    _, _, rest = page.read_text().partition(f"{BEGIN}\n\n")
    image, _, written = rest.partition(f"\n\n{END}")[0].partition("\n\n")
    assert image.endswith("(speed.svg)") and (page.parent / "speed.svg").exists()
    command = "apb bench report bench.readme=docs/results.md bench.figure=docs/speed.svg"
    assert command in page.read_text()
    assert apb("bench", "report").document["text"] == written, f"run {command}"


def test_growth_of_bytes_is_in_the_report(apb: Any, results: Path) -> None:
    ran = apb("bench", "report", "bench.growth_hosts=[4,8]", "bench.growth_block=4096")
    lines = {line.split("|")[1].strip(): line for line in ran.document["text"].splitlines() if line.startswith("| `")}
    assert set(lines) == {f"`{name}`" for name in ("apb", "spava", "star", "ring", "allgather", "ulysses")}
    assert "0 B / 0 B" in lines["`star`"] and ran.document["figure"] is None
    # Each host of a ring passes on all blocks but one: 32 layers, 4,096 bytes a token's K and V in bf16.
    sent = [count - 1 for count in (4, 8)]
    assert " / ".join(f"{n * 4096 * 4096 * 32 / 1e9:.1f} GB" for n in sent) in lines["`ring`"]


def test_what_speed_costs_is_in_the_figure(apb: Any, tmp_path: Path) -> None:
    def row(variant: str, tokens: int, index: int, flops: float, log_prob: float, seeds: str = "report") -> Row:
        about = {"model": "m", "dtype": "float32", "task": "vt", "variant": variant}
        about |= {"tokens": tokens, "seeds": seeds, "index": index}
        return about | {"prefill_flops": [flops], "log_prob": log_prob, "passing_bytes": 0, "sent_bytes": 0}

    rows = [row("full", tokens, index, 10.0, -1.0) for tokens in (100, 200) for index in range(2)]
    rows += [row("apb", tokens, index, 2.0, -1.5) for tokens in (100, 200) for index in range(2)]
    rows += [row("apb", 400, 0, 2.0, -1.5, "choose"), row("full", 400, 0, 2.0, -1.5, "choose")]
    rows += [row("star", 200, 7, 4.0, -1.2)]  # full attention did not answer that one
    rows += [{**row(variant, 200, 0, 10.0, -1.0), "task": "niah"} for variant in ("full", "apb")]
    for day, lines in (("2026-01-02", table(rows)), ("2026-01-01", [])):
        (tmp_path / f"{day}-ruler").mkdir()
        (tmp_path / f"{day}-ruler" / "summary.json").write_text(json.dumps({"table": lines}))
    assert {(x["variant"], x["tokens"]) for x in read(tmp_path)["ruler"]} == {
        (variant, tokens) for variant in ("full", "apb") for tokens in (100, 200)
    }
    figure = tmp_path / "figure.svg"
    ran = apb("bench", "report", f"bench.results={tmp_path}", f"bench.figure={figure}", "bench.growth_hosts=[2]")
    assert ran.document["rows"]["ruler"] == 6
    assert f"![Log-probability against cost]({figure})" in ran.document["text"]
    assert "m, float32, 200 tokens, 2 task(s) of 1-2 samples" in figure.read_text()
    lines = read(tmp_path)["ruler"]
    ring = {**lines[0], "variant": "ring", "task": "vt"}
    assert comparable([*lines, ring]) == lines  # ring was measured on one task of two


def test_the_report_wants_a_place(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("no marks")
    with pytest.raises(UserError, match="no place"):
        splice(file, "text")
    with pytest.raises(UserError, match="cannot be read"):
        splice(tmp_path / "absent.md", "text")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or cores() < 2, reason="needs two cores to pin to")
def test_predictions_beside_real_processes(apb: Any, tmp_path: Path) -> None:
    rates = tmp_path / "rates.json"
    assumed("cpu").save(rates)
    options = ("bench.hosts=2", "bench.strategies=[star]", "bench.repeats=1", "bench.validate=true")
    ran = apb(*EMULATE, *options, f"bench.rates={rates}")
    (row,) = ran.document["validation"]
    assert row["simulated_over_real"] > 0 and row["work_simulated_over_real"] > 0
    assert ran.code == 0 and row["strategy"] == "star" and row["predicted_s"]["median"] > 0 and row["real_s"]["n"] == 1
    assert row["within"] == abs(row["predicted_over_real"]["median"] - 1)
    assert new_and_missing("bench emulate, validated", ran.document) == ([], [])


def test_hosts_without_a_core_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from apb.host.messages import HostSpec

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(UserError, match="a core of its own"):
        PinnedCluster(HostSpec("none", "float32", "cpu"), 3)


def test_simulated_rows(apb: Any) -> None:
    words = ("bench", "simulate", "model=llama3.1-8b-shape", "bench.strategies=[full,ring,star,apb]")
    ran = apb(*words, "bench.hosts=[2,8]", "bench.tokens=[1024,1048576]", "bench.memory_gb=100")
    rows = {(r["strategy"], r["hosts"], r["tokens"]): r for r in ran.document["rows"]}
    assert ran.code == 0 and len(rows) == 2 * (1 + 2 * 3)
    long = rows["full", 1, 1048576]
    assert not long["fits"] and long["over_full"] == 1.0 and long["memory"] > 100e9
    assert rows["apb", 8, 1048576]["over_full"] > rows["ring", 8, 1048576]["over_full"] > 7
    assert all(r["worst_s"] >= r["seconds"] > 0 and r["simulated"] for r in rows.values())
    told = {(c["over"], c.get("below")) for c in ran.document["crossovers"]}
    assert {over for over, _ in told} <= {"tokens", "hosts", "replicas"} and any(o == "replicas" for o, _ in told)
    assert "SIMULATED" in ran.err and "replicas" in ran.err


def test_crossings() -> None:
    xs = [10, 100, 1000]
    found = crossings(xs, {"a": [1.0, 10.0, 100.0], "b": [10.0, 10.0 / 10**0.5 * 10**0.5, 10.0]})
    assert found == [{"at": 100, "below": "a", "above": "b"}]
    assert crossings(xs, {"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0]}) == []
    assert crossings(xs, {"a": [1.0, float("inf"), float("inf")], "b": [2.0, 3.0, 4.0]}) == [
        {"at": 100, "below": "a", "above": "b"}
    ]


def test_replicas_against_a_group() -> None:
    def row(strategy: str, hosts: int, tokens: int, s: float) -> dict[str, Any]:
        return {"strategy": strategy, "hosts": hosts, "tokens": tokens, "worst_s": s, "fits": True}

    # Two replicas answer one request in half of full's time.
    rows = [row("full", 1, 10, 1.0), row("full", 1, 1000, 100.0), row("apb", 2, 10, 1.0), row("apb", 2, 1000, 25.0)]
    (found,) = replicas(rows, [10, 1000], 2)
    assert found["below"] == "replicas" and 10 < found["at"] < 1000


def test_kernels_write_the_rates_that_simulate_reads(apb: Any, tmp_path: Path, results: Path) -> None:
    ran = apb(
        "bench",
        "kernels",
        *TINY,
        *CPU,
        "bench.tokens=[16,64]",
        "bench.repeats=1",
        f"out={tmp_path}/out",
        "bench.save=true",
    )
    kernels = {(row["kernel"], row["tokens"]) for row in ran.document["rows"]}
    assert ran.code == 0 and ("attention, causal", 64) in kernels and ("LM head, V/4 rows", 16) in kernels
    assert all(row["seconds"] > 0 and row["share"] > 0 for row in ran.document["rows"])
    assert len(kept(results, "kernels")) == len(kernels)
    rates = tmp_path / "out" / "rates.json"
    ran = apb("bench", "simulate", *TINY, "bench.tokens=[4096]", "bench.hosts=[4]", f"bench.rates={rates}")
    assert ran.code == 0 and "float32" in ran.document["rates"]["name"]
    refused = apb("bench", "simulate", *TINY, f"bench.rates={tmp_path}/none.json")
    refused.refused("rates", "apb bench kernels")
    apb("bench", "kernels", *TINY, *CPU, "compress=retaining").refused("random queries and keys", "compress=query")


def test_throughput_rows_are_kept_and_not_measured_again(apb: Any, model: Path, tmp_path: Path, results: Path) -> None:
    words = ("bench", "throughput", f"model={model}", *CPU, "bench.tokens=400", "bench.new_tokens=3", "bench.warmup=0")
    words += ("cluster.hosts=2", f"out={tmp_path}/out", "bench.save=true")
    first = apb(*words, "bench.repeats=1").document
    (row,) = first["rows"]
    parts = [row[name] for name in ("tokenise_s", "ship_s", "prefill_s", "first_step_s")]
    assert row["ttft_s"] == pytest.approx(sum(parts)) and all(part > 0 for part in parts)
    assert 380 < row["prompt_tokens"] <= 400 and row["bytes_sent"] == sum(row["bytes_by_link"].values())
    assert row["flops_utilisation"] > 0 and row["share_of_limit"] > 0 and row["seconds_of"].startswith("own work")
    again = apb(*words, "bench.repeats=2").document
    assert again["rows"][0] == row and len(again["rows"]) == 2 == again["ttft_s"]["n"]
    assert len(kept(results, "throughput")) == 2
    report = apb("bench", "report", "bench.growth_hosts=[2]").document
    assert report["rows"]["throughput"] == 2 and "apb + query, 2 hosts, virtual, 400 tokens" in report["text"]


def test_a_run_that_fails_does_not_lose_the_others(apb: Any, model: Path, tmp_path: Path) -> None:
    words = ("bench", "throughput", "-m", *TINY, *CPU, "bench.tokens=100", "bench.new_tokens=2", "bench.repeats=1")
    ran = apb(*words, "strategy=full,star", "cluster.hosts=2", f"out={tmp_path}/out")
    refused, fine = ran.document["runs"]
    assert ran.code == 2 and "runs on one host" in refused["error"]["message"] and fine["ttft_s"]["n"] == 1
    assert fine["rows"][0]["tokenise_s"] == 0.0  # random weights read no text
    assert "bench throughput -m" in fine["rows"][0]["command"]


def test_random_weights_read_no_text(apb: Any) -> None:
    ran = apb("ask", *TINY, "cluster=virtual", "dtype=float32", "device=cpu")
    ran.refused("random weights read no text")


def test_random_weights_of_a_folders_configuration(apb: Any, model: Path) -> None:
    ran = apb(
        *EMULATE[:2],
        f"model={model}-shape",
        *CPU,
        "bench.hosts=2",
        "bench.tokens=150",
        "bench.warmup_tokens=80",
        "bench.repeats=1",
        "bench.strategies=[star]",
    )
    assert ran.code == 0 and ran.document["rows"][0]["seconds"]["median"] > 0 and ran.document["limits"] == {}


@pytest.mark.parametrize(
    "words, told",
    [
        (("emulate", "bench.hosts=0"), "bench.hosts"),
        (("emulate", "bench.strategies=[rings]"), "ring"),
        (("emulate", "bench.tokens=30"), "no room"),
        (("emulate", "network=carrier"), "ethernet"),
        (("emulate", "network.inter_us=-1"), "network.inter_us"),
        (("simulate", "bench.hosts=[]"), "bench.hosts"),
        (("simulate", "bench.hosts=8"), "whole numbers"),
        (("simulate", "bench.machine=abacus"), "cuda"),
        (("kernels", "bench.tokens=[2]"), "16 or more"),
        (("throughput", "bench.new_tokens=0"), "bench.new_tokens"),
        (("report", "bench.growth_block=1"), "bench.growth_block"),
    ],
)
def test_refused(apb: Any, words: tuple[str, ...], told: str) -> None:
    device = CPU if words[0] in ("emulate", "kernels", "throughput") else ()
    apb("bench", words[0], *(TINY if words[0] != "report" else ()), *device, *words[1:]).refused(told)


def test_spreads() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "iqr": [1.75, 3.25], "n": 4}
    assert ratio([2.0, 9.0], [1.0, 3.0]) == {"median": 2.5, "iqr": [2.25, 2.75], "n": 2}


def test_asking_with_the_strategy_that_costs_least(ask: Any, apb: Any, model: Path, tmp_path: Path) -> None:
    found = ask("strategy=auto", "strategy.machine=cpu", "cluster.hosts=2").document
    assert (
        found["strategy"] == found["plan"]["strategy"] in ("ring", "burst", "allgather", "usp", "star", "apb", "spava")
    )
    exact = ask("strategy=auto", "strategy.exact=true", "cluster.hosts=2").document
    assert exact["exact"] and exact["conditioned_on"] is None
    ask("strategy=auto", f"strategy.rates={tmp_path}/none.json", "cluster.hosts=2").refused("rates", "none.json")
