"""``strategy=full`` gives transformers' own greedy tokens."""

from __future__ import annotations

import functools
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apb.engine.engine import Engine
from apb.models.loading import load_model
from bench.tools.prose import reference
from tests.claims.conftest import Claims, most
from tests.claims.ranks import on_cpu

PROMPTS, NEW_TOKENS = 50, 64
LOGITS_ATOL = 1e-4


@functools.cache
def both(model: str) -> tuple[Engine, Any, list[int]]:
    setup = on_cpu(model, strategy="full")
    theirs = load_model(Path(setup.spec.model_path), dtype="float32", device="cpu")
    return Engine.launch(setup), theirs, setup.tokenizer(reference(), add_special_tokens=False)["input_ids"]


def compared(model: str, number: int, length: int) -> dict[str, Any]:
    engine, theirs, source = both(model)
    start = random.Random(number).randrange(len(source) - length)
    ids = source[start : start + length]
    split = max(1, len(ids) - 8)
    handle = engine.prefill(ids[:split], ids[split:], chat=False)
    logits = handle.logits()
    answer = engine.generate(handle, NEW_TOKENS)
    handle.release()
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        want = theirs(prompt, logits_to_keep=1).logits[0, -1]
        mask = torch.ones_like(prompt)
        out = theirs.generate(prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    same = list(answer.token_ids) == out[0, len(ids) :].tolist()
    error = (logits - want).abs().max().item()
    return {"ok": same and error <= LOGITS_ATOL, "same_tokens": same, "logits_error": error}


def test_full_attention_decodes_as_transformers(claims: Claims) -> None:
    for number in range(PROMPTS):
        length = round(20 * 200 ** (number / (PROMPTS - 1)))  # evenly on a logarithmic scale: 20 to 4,000
        claims.sample(f"full/{length}/{number}", partial(compared, claims.model, number, length))
    rows = claims.under("full/")
    same = sum(row["same_tokens"] for row in rows)
    claims.conclude("full", token_for_token=same, max_logits_error=most(rows, "logits_error"))
