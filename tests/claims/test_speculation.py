"""Speculative decoding against plain decoding from the same cache: the same tokens, greedy and with the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from apb.decode.base import Decoder
from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.decode.sampling import Sampling
from apb.engine.engine import Engine
from apb.engine.handle import KVHandle
from apb.train.questions import KINDS
from bench.decode.questions import Asked, questions
from tests.claims.conftest import Claims
from tests.claims.ranks import on_cpu

NEW_TOKENS = 24
TIE = 1e-4  # of the top two logits, or of the random number to the edge of its token's interval
TIES = 1 / 200  # prompts that a tie may befall
WAYS: dict[str, Decoder] = {"tree": Eagle2(), "chain": Eagle2(width=1, depth=5, tokens=6), "lookup": Lookup()}
RUNS = {"1 host": (1, "float32"), "3 hosts": (3, "float32"), "1 host, bfloat16": (1, "bfloat16")}
SAMPLING = {"greedy": Sampling(), "sampled": Sampling(temperature=0.7, top_p=0.95, seed=5)}


def _asked(item: Asked, *, first: bool) -> Iterator[tuple[str, Mapping[str, Decoder]]]:
    """Yield how a run asks a question: the first takes all greedily by tree, every fourth one sampled, every eighth by
    chain and lookup too; the others take fewer. Those behind long documents are always asked, in all ways."""
    every = 1 if first or item.context else 4 if item.kind in KINDS else 16
    if item.number % every:
        return
    ways = WAYS if item.context or item.number % 8 == 0 else {"tree": WAYS["tree"]}
    yield "greedy", ways
    if item.context or item.number % 4 == 0:
        yield "sampled", ways


def _one(engine: Engine, item: Asked, how: str, dtype: str, ways: Mapping[str, Decoder]) -> dict[str, Any]:
    sampling = SAMPLING[how]
    options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    handle = engine.prefill(item.prompt(engine.setup.tokenizer))
    plain = handle.fork()
    want = engine.generate(plain, NEW_TOKENS, **options).token_ids
    plain.release()
    divergences, accepted = {}, {}
    for name, decoder in ways.items():
        copy = handle.fork()
        result = engine.generate(copy, NEW_TOKENS, decoder, **options)
        copy.release()
        accepted[name] = result.metrics["accepted_length"]
        if result.token_ids != want:
            divergences[name] = _margin(handle, want, result.token_ids, sampling)
    handle.release()
    ok = dtype != "float32" or all(margin < TIE for margin in divergences.values())
    return {"ok": ok, "dtype": dtype, "tokens": len(want), "divergences": divergences, "accepted_length": accepted}


def _margin(handle: KVHandle, want: tuple[int, ...], got: tuple[int, ...], sampling: Sampling) -> float:
    """Return how near to a tie the decision was where two answers part."""
    at = next((i for i in range(len(want)) if i >= len(got) or got[i] != want[i]), None)
    if at is None:
        return math.inf  # it went on where plain decoding ended
    rows_SV = handle.score(want[: at + 1], first=at + 1).first
    log_probs_V = rows_SV[at]
    if sampling.temperature == 0:
        top = log_probs_V.topk(2).values
        return float(top[0] - top[1])
    probs_V = sampling.probabilities(log_probs_V)
    edges = torch.cat([probs_V.new_zeros(1), probs_V.cumsum(0)])
    u = sampling.uniform(handle.next_position + at) * float(edges[-1])
    return float((edges - u).abs().min())


def test_drafts_change_no_token(claims: Claims, data: list[str]) -> None:
    """Generated questions, some behind long documents, and those of JSONL files."""
    items = [item for file in data for item in questions((), 200, (0,), file)]
    items += questions(KINDS, 8, (0,), None) + questions(KINDS, 1, (1_500,), None)
    for run, (hosts, dtype) in RUNS.items():
        strategy = "full" if hosts == 1 else "apb"
        setup = on_cpu(claims.model, hosts=hosts, strategy=strategy, dtype=dtype, draft=claims.model)
        asked = [(item, how, ways) for item in items for how, ways in _asked(item, first=run == "1 host")]
        if all(f"speculation/{run}/{item.key}/{how}" in claims for item, how, _ in asked):
            continue
        with Engine.launch(setup) as engine:
            for item, how, ways in asked:
                claims.sample(f"speculation/{run}/{item.key}/{how}", partial(_one, engine, item, how, dtype, ways))
    exact = [row for row in claims.under("speculation/") if row["dtype"] == "float32"]
    rounded = [row for row in claims.under("speculation/") if row["dtype"] != "float32"]
    ties = [row for row in exact if row["divergences"]]
    claims.conclude(
        "speculation",
        answers=sum(len(row["accepted_length"]) for row in exact),
        ties=[{"key": row["key"], **row["divergences"]} for row in ties],
        # Nothing is claimed of bfloat16: how many first divergences there are, and how near the decisions were.
        bfloat16_answers=sum(len(row["accepted_length"]) for row in rounded),
        bfloat16_margins=sorted(m for row in rounded for m in row["divergences"].values()),
    )
    assert len(ties) <= TIES * len(exact)
