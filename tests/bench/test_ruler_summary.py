"""Results of the fidelity benchmark: equal cost, statistics, tables, plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apb.compress import compressor
from apb.engine.setup import Setup
from apb.plan.bytes import sent_bytes
from apb.plan.flops import critical_flops
from apb.strategies import strategy
from bench.ruler.answers import FullAnswers
from bench.ruler.budget import fit
from bench.ruler.measure import divergence
from bench.ruler.plots import comparable, draw
from bench.ruler.stats import holm, interval, sign_flip
from bench.ruler.summary import chosen, comparisons, latest, table
from bench.ruler.variant import Variant, baselines
from burst.errors import UserError
from tests.support.tiny import byte_tokenizer, make_prompt, tiny_llama

WORDS = byte_tokenizer()


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


def test_a_choice_holds_at_other_costs_but_not_for_another_prompt() -> None:
    def choosing(strategy: str, good: str, bad: str) -> list[dict[str, Any]]:
        by = ((good, -1.0), (bad, -2.0))
        return [row(strategy, i, p, base=strategy, compressor=c, seeds="choose") for c, p in by for i in (0, 1)]

    rows = choosing("apb, 8 hosts", "a", "b") + choosing("apb, 8 hosts, question first", "b", "a")
    rows += choosing("apb, 8 hosts, at 7 bytes", "b", "a")
    plain = "apb, 8 hosts, question not known"  # other compressors can do that, so nothing was chosen for it
    fitted = ("apb, 8 hosts, at star's FLOPs", "apb, 8 hosts, at 9 bytes, question first", "apb, 8 hosts, at 7 bytes")
    for base in (*fitted, plain):
        for scorer in ("a", "b"):
            rows += [row(f"{base} {scorer}", i, -1.0, base=base, compressor=scorer) for i in (0, 1)]
    rows += [row("full", i, -1.0) for i in (0, 1)]
    assert [c["variant"] for c in comparisons(rows)] == [
        "apb, 8 hosts, at star's FLOPs a",
        "apb, 8 hosts, at 9 bytes, question first b",
        "apb, 8 hosts, at 7 bytes b",
        f"{plain} a",
        f"{plain} b",
    ]


def test_types_are_kept_apart_but_share_a_choice() -> None:
    rows = [row(f"apb + {name}", i, p, seeds="choose") for name, p in (("good", -1), ("bad", -2)) for i in range(2)]
    for dtype, mean in (("float32", -1.0), ("bfloat16", -3.0)):
        for name in ("full", "apb + good", "apb + bad"):
            rows += [row(name, i, mean, dtype=dtype) for i in range(3)]
    lines = {(x["variant"], x["dtype"]): x for x in table(rows) if x["seeds"] == "report"}
    assert len(lines) == 6 and lines["full", "bfloat16"]["log_prob"] == -3 and lines["full", "float32"]["samples"] == 3
    found = comparisons(rows)
    assert [(c["variant"], c["dtype"], c["samples"]) for c in found] == [
        ("apb + good", "float32", 3),
        ("apb + good", "bfloat16", 3),
    ]


def test_stars_question_stands_where_the_variants_does() -> None:
    names = ("apb", "apb, question first", "star", "star, question first")
    rows = [row(name, i, -1.0) for name in names for i in range(2)]
    against = {name: {c["against"] for c in comparisons(rows) if c["variant"] == name} for name in names[:2]}
    assert against == {"apb": {"star"}, "apb, question first": {"star", "star, question first"}}


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


# -- what is drawn, and kept ----------------------------------------------------------------------------


def test_what_has_no_full_attention_beside_it_is_not_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("star", 0, -1.0, seeds="choose"), row("star", 0, -1.0), row("full", 0, -2.0)]
    assert draw(table(rows), tmp_path) == ["heatmap-9-report-float32.png", "frontier-9-report-float32.png"]


def test_means_over_tasks_are_of_tasks_that_ask() -> None:
    asked = [row(name, 0, -1.0, task="vt") for name in ("full", "star", "full, question first")]
    lines = table([*asked, row("full", 0, -1.0, task="perplexity"), row("star", 0, -1.0, task="perplexity")])
    assert {x["variant"] for x in comparable(lines)} == {"full", "star", "full, question first"}
    assert {x["task"] for x in comparable(lines)} == {"vt"}
    texts = [line for line in lines if line["task"] == "perplexity"]
    assert comparable(texts) == texts


def test_answers_of_full_attention_are_found_again(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        kept = FullAnswers(folder)
        kept.put("k0", torch.ones(2, 3))
        again = kept if folder is None else FullAnswers(folder)
        assert again.get("k1") is None
        torch.testing.assert_close(again.get("k0"), torch.ones(2, 3))


def test_of_a_sample_measured_twice_the_later_row_counts() -> None:
    assert [r["log_prob"] for r in latest([row("full", 0, -1.0), row("star", 0, -2.0), row("full", 0, -3.0)])] == [
        -3,
        -2,
    ]
