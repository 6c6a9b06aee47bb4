"""``apb plan``: what a prefill would cost, from lengths or texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ("tests.support.command",)


def test_plan(apb: Any, model: Path, document: Path) -> None:
    ran = apb("plan", "-d", str(document), "-q", "Who?", f"model={model}", "cluster=virtual", "cluster.hosts=3")
    found = ran.document
    assert ran.code == 0 and found["hosts"] == 3 and found["fits"] is True
    assert [row["host"] for row in found["plan"]["per_host"]] == [0, 1, 2]
    assert "It fits" in ran.err and "passes on" in ran.err


def test_plan_of_lengths_alone(apb: Any, model: Path, document: Path) -> None:
    common = ("plan", f"model={model}")
    found = apb(*common, "context_tokens=400", "query_tokens=40", "memory_gb=80").document
    assert (found["context_tokens"], found["query_tokens"]) == (400, 40)
    assert found["memory_available_bytes"] == 80_000_000_000
    assert apb(*common, "context_tokens=400", "query_tokens=40", "compress=null").document["plan"] == found["plan"]
    apb(*common, "context_tokens=400", "memory_gb=0.0001").refused("does not fit", "0.0 GB free")
    apb(*common, "compare=true").refused("unknown key 'compare'")
    apb(*common, "context_tokens=4000").refused("longer than the model's context")
    for key in ("context_tokens", "query_tokens"):
        many = f"{key}={2**31 - 1}"  # as tokens, more than memory holds
        apb(*common, "context_tokens=400", many).refused("longer than the model's context")
        apb(*common, "context_tokens=400", many, "yarn=auto").refused("longer than the model's context")
    assert apb(*common, "context_tokens=4000", "max_positions=5000").code == 0
    assert apb(*common, "context_tokens=4000", "yarn=auto").code == 0
    apb(*common, "context_tokens=4000", "yarn=1").refused("longer than the model's context")
    apb(*common, "context_tokens=4000", "max_positions=0").refused("max_positions is out of range")
    apb(*common, "context_tokens=1").refused("context_tokens leaves no room")
    apb(*common, "context_tokens=400", "query_tokens=2").refused("query_tokens leaves no room")
    apb(*common, "context_tokens=400", "-d", str(document), "-q", "Who?").refused("one of them")


def test_what_an_answer_needs_is_in_the_plan(apb: Any, model: Path) -> None:
    def kv(*words: str) -> list[int]:
        common = ("plan", f"model={model}", "context_tokens=400", "query_tokens=40", "memory_gb=80", "cluster.hosts=2")
        found = apb(*common, *words).document["plan"]["per_host"]
        return [host["memory"]["kv"] for host in found]

    (first, last), row = kv(), kv("decode.max_new_tokens=65")[1] - kv()[1]
    assert kv("decode=lookup", "decode.tokens=9") == [first, last + 8 * row]
    assert kv("decode.placement=gathered") == [first, last + 440 * row]


def test_plan_explains_the_choice_of_a_schedule(apb: Any, model: Path) -> None:
    common = ("plan", f"model={model}", "context_tokens=400", "memory_gb=80")
    four = (*common, "cluster.hosts=4")
    assert apb(*four).document["burst"] is None
    ran = apb(*four, "strategy=ring", "burst.explain=true", "burst.nodes=2", "burst.machine=cuda")
    found = ran.document["burst"]
    rows = {row["schedule"]: row for row in found["candidates"]}
    assert set(rows) == {"ring", "double_ring", "burst", "allgather", "ulysses", "usp"}
    assert found["schedule"] == next(iter(rows)) and found["nodes"] == 2 and found["layout"] == "zigzag"
    sent = ran.document["plan"]["bytes_by_kind"]["kv"]  # by all layers
    assert rows["ring"]["intra_bytes"] + rows["ring"]["inter_bytes"] == sent / found["layers"]
    assert all(row["exposed_ms"] >= 0 for row in rows.values())
    assert "exposed ms" in ran.err and found["reason"] in ran.err
    apb(*four, "burst.explain=true", "burst.nodes=5").refused("nodes", "1 to 4")
    apb(*four, "burst.explain=true", "burst.machine=abacus").refused("cpu", "cuda")
    assert apb(*common, "strategy=full", "burst.explain=true").document["burst"]["schedule"]


def test_chunks_are_chosen_by_the_memory(apb: Any, model: Path) -> None:
    common = ("plan", f"model={model}", "strategy=full", "context_tokens=480", "query_tokens=20")

    def gigabytes(*words: str) -> float:
        found = apb(*common, "memory_gb=80", *words).document["plan"]
        return float(sum(found["per_host"][0]["memory"].values()) + 400_000_000) / 1e9

    whole, chunked = gigabytes(), gigabytes("chunk_tokens=64")
    assert chunked < whole == gigabytes("chunk_tokens=null")
    tight = f"memory_gb={chunked:.9f}"
    ran = apb(*common, tight)
    assert ran.document["plan"]["chunk_tokens"] == 64 and "chunks of 64 tokens" in ran.err
    assert apb(*common, f"memory_gb={whole:.9f}").document["plan"]["chunk_tokens"] is None
    for words in (("chunk_tokens=null",), ("chunk_tokens=128",)):
        assert "chunk_tokens=64 makes it fit" in apb(*common, tight, *words).refused("does not fit")["remedy"]
    apb(*common, "chunk_tokens=0").refused("chunk_tokens=0", "1 and more")
    apb(*common, "chunk_tokens=many").refused("chunk_tokens must be", "whole number")


def test_budgets_are_shown(apb: Any, model: Path) -> None:
    words = ("plan", f"model={model}", "context_tokens=400", "query_tokens=40", "memory_gb=64", "cluster.hosts=4")
    fixed = apb(*words).document["plan"]
    full = apb(*words[:-1], "strategy=full").document["plan"]["prefill_flops"][0]
    cost = round(0.98 * max(fixed["prefill_flops"]) / full, 4)
    ran = apb(*words, f"strategy.cost={cost}")
    assert ran.code == 0, ran.err
    plan = ran.document["plan"]
    assert 0.9 * cost * full < max(plan["prefill_flops"]) <= cost * full < max(fixed["prefill_flops"])
    assert plan["bytes_by_kind"]["passing"] <= fixed["bytes_by_kind"]["passing"]
    apb(*words, "strategy.cost=0.01").refused("strategy.cost", "FLOPs")


@pytest.mark.parametrize("words", [[], ["chat=false"], ["question_first=true"]])
def test_the_preset_for_a_shape_without_a_tokenizer_plans(apb: Any, words: list[str]) -> None:
    found = apb("plan", "experiment=long", "cluster=virtual", *words).document
    assert found["context_tokens"] == 131072 and found["query_tokens"] == 64 and found["fits"]
