"""``strategy=full`` against transformers' own greedy generate."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from bench.verify.runner import Recorder

NEW_TOKENS = 64
LOGITS_ATOL = 1e-4


def check(recorder: Recorder, model: str, prompts: int = 50) -> dict[str, Any]:
    """Compare token for token over prompts of 20 to 4,000 tokens, and the prefill's logits."""
    from apb.models.loading import load_model

    setup = Setup.make(EngineOptions(model, strategy="full", device="cpu", dtype="float32"))
    oracle = load_model(Path(setup.spec.model_path), dtype="float32", device="cpu")
    source = setup.tokenizer(document_text(), add_special_tokens=False)["input_ids"]
    with Engine.launch(setup) as engine:
        for i in range(prompts):
            length = round(20 * 200 ** (i / (prompts - 1)))  # evenly on a logarithmic scale: 20 .. 4,000
            start = random.Random(i).randrange(len(source) - length)
            recorder.sample(f"full/{length}/{i}", partial(_one, engine, oracle, source[start : start + length]))
    rows = list(recorder.rows("full/"))
    return {
        "ok": all(row["ok"] for row in rows),
        "prompts": len(rows),
        "token_for_token": sum(row["same_tokens"] for row in rows),
        "max_logits_error": max(row["logits_error"] for row in rows),
    }


def document_text() -> str:
    """Return real prose that every Python has: the language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _one(engine: Engine, oracle: Any, ids: list[int]) -> dict[str, Any]:
    split = max(1, len(ids) - 8)
    handle = engine.prefill(ids[:split], ids[split:], chat=False)
    logits = handle.logits()
    answer = engine.generate(handle, NEW_TOKENS)
    handle.release()
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        want = oracle(prompt, logits_to_keep=1).logits[0, -1]
        out = oracle.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    same = list(answer.token_ids) == out[0, len(ids) :].tolist()
    error = (logits - want).abs().max().item()
    return {"ok": same and error <= LOGITS_ATOL, "same_tokens": same, "logits_error": error}
