"""The fidelity benchmark: samples, scoring, budgets, statistics, and the command killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apb.compress import compressor
from apb.setup import Setup
from apb.strategies import strategy
from apb.strategies.budget import critical_flops, sent_bytes
from bench.ruler import TASKS, sample
from bench.ruler.base import Ask, mix
from bench.ruler.budget import fit
from bench.ruler.measure import divergence
from bench.ruler.official import read
from bench.ruler.plots import draw
from bench.ruler.prompts import prompt, target
from bench.ruler.scoring import accuracy
from bench.ruler.stats import holm, interval, sign_flip
from bench.ruler.store import FILE, Store
from bench.ruler.summary import chosen, comparisons, table
from bench.ruler.variant import Variant, baselines
from burst.errors import UserError
from launch.cli import main
from tests.tiny import byte_tokenizer, make_prompt, saved_llama, tiny_llama

LENGTH = 6000  # tokens of a byte-level tokenizer: some 1,500 of a usual one
WORDS = byte_tokenizer()


# -- samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_exactly_the_tokens_asked_for(task: str) -> None:
    for tokens in (LENGTH, LENGTH + 1):
        made = sample(WORDS, task, tokens, "report", 0)
        assert len(prompt(WORDS, made).token_ids) == tokens
        assert made == sample(WORDS, task, tokens, "report", 0)
        assert made.document != sample(WORDS, task, tokens, "choose", 0).document
    assert target(WORDS, made.ask)


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("perplexity", "vt_1hop")])
def test_answers_stand_in_the_document_and_the_question_does_not_give_them_away(task: str) -> None:
    made = sample(WORDS, task, LENGTH, "report", 3)
    document = WORDS.decode(made.document)
    for ask in filter(None, (made.ask, made.second)):
        assert all(answer in document for answer in ask.answers)
        assert not any(answer in ask.question + ask.prefix for answer in ask.answers)
        assert accuracy(ask, ask.prefix + ask.target) == 1.0
    if made.second is not None:
        assert set(made.second.answers).isdisjoint(made.ask.answers) or task == "reading"
        assert made.second.question != made.ask.question


def test_needles_stand_as_often_as_they_should() -> None:
    for task, values in (("niah_multikey_1", 4), ("niah_multivalue", 4), ("niah_multiquery", 5), ("niah_single_3", 1)):
        text = WORDS.decode(sample(WORDS, task, LENGTH, "report", 1).document)
        assert len(re.findall(r"One of the special magic \w+ for [\w-]+ is: [\w-]+\.", text)) == values
    many = WORDS.decode(sample(WORDS, "niah_multikey_3", LENGTH, "report", 1).document)
    assert len(re.findall(r"special magic uuids for [\w-]{36} is: [\w-]{36}\.", many)) > 20


def test_chains_are_assigned_in_order() -> None:
    for task, chains, hops in (("vt", 1, 4), ("vt_1hop", 2, 1)):
        made = sample(WORDS, task, LENGTH, "report", 2)
        value: dict[str, str] = {}
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", WORDS.decode(made.document)):
            value[name] = value.get(given, given)  # a copy before its source would leave a name here
        assert len(value) == chains * (hops + 1) and all(v.isdigit() for v in value.values())
        held = re.findall(r"\d+|[A-Z]{3,}", made.ask.question)[-1]
        want = {n for n, v in value.items() if v == held} if task == "vt" else {value[held]}
        assert set(made.ask.answers) == want


def test_counted_words_are_the_most_frequent() -> None:
    for task, pattern, skip in (("cwe", r"\d+\. ([a-z-]+)", 0), ("fwe", r" ([a-z]{6})(?= )", 0)):
        made = sample(WORDS, task, LENGTH, "report", 4)
        text = WORDS.decode(made.document).split("\n", 1)[1]
        words = re.findall(pattern, text)
        counts = sorted(((words.count(w), w) for w in set(words)), reverse=True)
        top = counts[skip : skip + len(made.ask.answers)]
        assert {w for _, w in top} == set(made.ask.answers)
        assert top[-1][0] > counts[len(made.ask.answers)][0]


def test_a_task_that_does_not_fit_is_refused() -> None:
    for task, tokens in (("niah_multikey_1", 400), ("cwe", 900), ("fwe", 400)):
        with pytest.raises(UserError, match="does not fit"):
            sample(WORDS, task, tokens, "report", 0)
    with pytest.raises(UserError, match="does not fit"):
        sample(WORDS, "reading", 100, "report", 0)
    with pytest.raises(UserError, match="unknown task"):
        sample(WORDS, "niah_singel_1", LENGTH, "report", 0)


def test_mixing_keeps_the_order_of_what_is_planted() -> None:
    for seed in range(20):
        got = mix([1], [[2, 2], [3]], ([4, 5, 6] for _ in range(99)), 30, random.Random(seed), shuffle=False)
        assert len(got) == 30 and got[0] == 1 and [x for x in got if x in (2, 3)] == [2, 2, 3]


def test_the_question_can_stand_first_as_well() -> None:
    made = sample(WORDS, "reading", LENGTH, "report", 0)
    last, first = prompt(WORDS, made), prompt(WORDS, made, question_first=True)
    assert first.question == last.question and first.question is not None
    assert first.context_ids[first.head :] == last.context_ids[last.head :] == made.document
    between = WORDS.decode(first.context_ids[last.head : first.head])
    assert between == f"{made.ask.question}\n\n"
    assert WORDS.decode(first.question.query_ids) == f"\n\n{made.ask.question}\nbot:{made.ask.prefix}"


# -- RULER's own files and scores -------------------------------------------------------------------------


def test_official_files_are_read(tmp_path: Path) -> None:
    rows = {
        "niah_single_1": ("Text.\nA needle: 7.\nWhat is the magic number? The magic number is", ["7"], None, "all"),
        "vt": ("X\nQuestion: old? Answer: A\n\nY\nQuestion: Find all. Answer: they are: ", ["A", "B"], None, "all"),
        "qa_1": ("Doc 1.\n\nQuestion: Who? Answer:", ["He", "Him"], " Answer:", "part"),
    }
    for task, (text, outputs, prefix, _) in rows.items():
        (tmp_path / task).mkdir()
        row = {"index": 0, "input": text, "outputs": outputs, "length": 9} | (
            {"answer_prefix": prefix} if prefix else {}
        )
        (tmp_path / task / "validation.jsonl").write_text(json.dumps(row) + "\n\n")
    got = {s.task: s for s in read(WORDS, tmp_path)}
    assert set(got) == set(rows)
    for task, (text, outputs, _, match) in rows.items():
        assert got[task].ask.answers == tuple(outputs) and got[task].ask.match == match
        assert text.startswith(WORDS.decode(got[task].document))
    niah, vt, qa = (got[t] for t in rows)
    assert (WORDS.decode(niah.document), niah.ask.question) == ("Text.\nA needle: 7.", "What is the magic number?")
    assert niah.ask.prefix == "The magic number is"
    assert (vt.ask.question, vt.ask.prefix) == ("Question: Find all.", "Answer: they are:")
    assert WORDS.decode(vt.document).endswith("Y")
    assert (qa.ask.question, qa.ask.prefix) == ("Question: Who?", "Answer:")


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"input": "no mark", "outputs": ["a"]}', '{"input": "\\nWhat ?", "outputs": []}']
)
def test_lines_that_are_no_samples_are_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "niah_single_1.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match="not a RULER sample") as error:
        list(read(WORDS, file))
    assert "line 1" in str(error.value.given)
    with pytest.raises(UserError, match="no RULER samples there"):
        list(read(WORDS, tmp_path / "missing"))


def test_scores_are_rulers() -> None:
    every, one = Ask("", "", ("alpha", "Beta")), Ask("", "", ("alpha", "Beta"), match="part")
    for text, share, any_one in (("ALPHA and beta", 1.0, 1.0), ("only Alphabet", 0.5, 1.0), ("none", 0.0, 0.0)):
        assert accuracy(every, text) == share and accuracy(one, text) == any_one


# -- equal cost -------------------------------------------------------------------------------------------


def setup(name: str, hosts: int = 8, compress: str | None = None, **options: Any) -> Setup:
    scorer = compressor(compress) if compress else None
    return Setup(None, tiny_llama(torch.float32).shape, WORDS, strategy(name, **options), scorer, hosts)  # type: ignore[arg-type]


def test_lengths_are_fitted_to_flops_and_bytes() -> None:
    lengths = make_prompt(1503, head=20, question=30).lengths
    apb, star = setup("apb", compress="query"), setup("star")
    budget = critical_flops(star.strategy.plan(lengths, 8, star.shape))

    def plan(chosen: Any) -> Any:
        return chosen.plan(lengths, 8, apb.shape, apb.compressor)

    assert critical_flops(plan(apb.strategy)) < budget
    fitted: Any = fit(apb, lengths, flops=budget)
    one_more = dataclasses.replace(fitted, passing_len=fitted.passing_len + 1)
    if 2 * (fitted.passing_len + 1) <= 187 + 30:
        one_more = dataclasses.replace(one_more, anchor_len=2 * one_more.passing_len)
    assert critical_flops(plan(fitted)) <= budget < critical_flops(plan(one_more))

    sent = sent_bytes(plan(apb.strategy)) // 2
    halved: Any = fit(apb, lengths, sent=sent)
    assert sent_bytes(plan(halved)) <= sent < sent_bytes(plan(strategy("apb", passing_len=halved.passing_len + 1)))
    both: Any = fit(apb, lengths, sent=0, flops=budget)
    assert both.passing_len == 0 and critical_flops(plan(both)) <= budget
    assert both.anchor_len > 187 // 4
    with pytest.raises(UserError, match="below what the strategy needs"):
        fit(apb, lengths, flops=1000)
    with pytest.raises(UserError, match="no lengths that could be fitted"):
        fit(star, lengths, flops=budget)


def test_variants_name_what_differs() -> None:
    lengths = make_prompt(1503, head=20, question=30).lengths
    asked = Variant("tiny", setup("apb", compress="query", passing_len=9), flops="star")
    assert asked.label == "apb(passing_len=9) + query, 8 hosts, at star's FLOPs"
    names = [v.label for v in baselines(asked)]
    assert names == ["full", "full, question first", "apb(passing_len=9) + random, 8 hosts, at star's FLOPs"]
    assert [v.label for v in baselines(Variant("tiny", setup("star")))] == names[:2]
    star = setup("star").strategy.plan(lengths, 8, asked.setup.shape)
    got = asked.fitted(lengths).strategy.plan(lengths, 8, asked.setup.shape, asked.setup.compressor)
    assert 0.97 * critical_flops(star) < critical_flops(got) <= critical_flops(star)
    full = setup("full", hosts=1).strategy.plan(lengths, 1, asked.setup.shape)
    shared = Variant("tiny", setup("apb", compress="query"), flops=0.2).fitted(lengths).strategy
    share = critical_flops(shared.plan(lengths, 8, asked.setup.shape, asked.setup.compressor)) / critical_flops(full)
    assert 0.19 < share <= 0.2


# -- statistics -------------------------------------------------------------------------------------------


def test_intervals_cover_what_they_should() -> None:
    rng = np.random.default_rng(1)
    covered = [low <= 0.3 <= high for low, high in (interval(rng.normal(0.3, 1, 40)) for _ in range(100))]
    assert 85 <= sum(covered) <= 100
    assert interval([0.5] * 9) == (0.5, 0.5)


def test_sign_flips_find_differences_and_only_those() -> None:
    rng = np.random.default_rng(2)
    assert sign_flip(rng.normal(0.5, 1, 60)) < 0.01 < sign_flip(rng.normal(0.0, 1, 60))
    assert sign_flip([-0.1] * 20) > 0.99
    assert sign_flip([0.1] * 20, shift=0.2) > 0.99
    few = [1.0, 2.0, 3.0]  # 1 of 8 flips is as large
    assert abs(sign_flip(few) - 1 / 8) < 0.02


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_divergence_is_kl() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    want = (0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)) / 2
    assert divergence(p.log(), q.log()) == pytest.approx(want)


def row(variant: str, index: int, log_prob: float, **more: Any) -> dict[str, Any]:
    base, _, scorer = variant.partition(" + ")
    return {
        "model": "m",
        "dtype": "float32",
        "task": "t",
        "tokens": 9,
        "seeds": "report",
        "index": index,
        "variant": variant,
        "base": base,
        "strategy": base.split(",")[0],
        "compressor": scorer or None,
        "random": scorer == "random",
        "hosts": 1 if base.startswith("full") else 8,
        "question_first": "first" in variant,
        "log_prob": log_prob,
        "kl": 0.1,
        "prefill_flops": [10] if base.startswith("full") else [1, 2],
        "passing_bytes": 3,
        "sent_bytes": 4,
    } | more


def test_comparisons_are_paired_and_of_the_chosen_compressor() -> None:
    rows = [row("apb + good", i, -1.0, seeds="choose") for i in range(3)]
    rows += [row("apb + bad", i, -2.0, seeds="choose") for i in range(3)]
    rows += [row("apb + random", i, -0.5, seeds="choose") for i in range(3)]
    means = {"full": -1.0, "full, question first": -0.5, "apb + good": -0.8, "apb + bad": -9.0, "apb + random": -1.2}
    means |= {"star": -1.1}
    rows += [row(name, i, mean + 5 * (i % 3)) for i in range(40) for name, mean in means.items()]
    rows.append(row("apb + good", 40, -100.0))  # has no partner
    found = {(c["variant"], c["against"]): c for c in comparisons(rows)}
    assert {v for v, _ in found} == {"apb + good", "star"}
    got = {against: c for (v, against), c in found.items() if v == "apb + good"}
    assert set(got) == {"full", "full, question first", "apb + random", "star"}
    assert got["full"]["difference"] == pytest.approx(0.2) and got["full"]["samples"] == 40
    assert got["full, question first"]["interval"] == pytest.approx((-0.3, -0.3))
    assert got["apb + random"]["p_holm"] < 0.05 < got["full, question first"]["p_holm"]
    assert got["star"]["flops_ratio"] == 1.0 and got["full"]["flops_ratio"] == 0.2


def test_a_choice_takes_two_and_is_made_on_what_both_have() -> None:
    rows = [row("apb + one", i, -1.0, seeds="choose") for i in range(2)]
    assert chosen([*rows, *(row("apb + random", i, -0.5, seeds="choose") for i in range(2))]) == {}
    rows += [row("apb + two", 0, -0.9, seeds="choose"), row("apb + two", 7, -99.0, seeds="choose")]
    assert chosen(rows) == {("m", 9, "apb"): "two"}


def test_tables_are_means_with_shares_of_full() -> None:
    rows = [row("full", i, -i, accuracy=i % 2) for i in range(4)] + [row("star", i, -2 * i) for i in range(4)]
    full, star = table(rows)
    assert (full["log_prob"], star["log_prob"], full["accuracy"], star["accuracy"]) == (-1.5, -3.0, 0.5, None)
    assert (full["flops_share"], star["flops_share"]) == (1.0, 0.2)
    assert (full["less_full"], star["less_full"]) == (0.0, -1.5)
    assert table([*rows, row("star", 9, -90.0)])[1]["less_full"] == -1.5  # full has no such sample
    assert full["accuracy_interval"][0] < 0.5 < full["accuracy_interval"][1]


# -- the command ------------------------------------------------------------------------------------------


def test_what_has_no_full_attention_beside_it_is_not_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("star", 0, -1.0, seeds="choose"), row("star", 0, -1.0), row("full", 0, -2.0)]
    assert draw(table(rows), tmp_path) == ["heatmap-9-report.png", "frontier-9-report.png"]


def test_a_store_forgets_a_line_that_was_cut_off(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for i in range(2):
        store.add(f"k{i}", row("full", i, -1.0))
    store.put_full("k0", torch.ones(2, 3))
    file = tmp_path / FILE
    file.write_text(file.read_text()[:-30])
    again = Store(tmp_path)
    assert "k0" in again and "k1" not in again and again.full("k1") is None
    again.add("k1", row("full", 1, -2.0))
    assert [r["log_prob"] for r in Store(tmp_path).rows] == [-1.0, -2.0]
    torch.testing.assert_close(again.full("k0"), torch.ones(2, 3))


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
    assert found["plots"] == ["heatmap-1200-report.png", "frontier-1200-report.png"]
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
    assert code == 2 and found["error"]["remedy"] == "Write 'apb bench ruler', for example."
