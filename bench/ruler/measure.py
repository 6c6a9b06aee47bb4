"""One sample measured: how likely the right answer is, how far from full attention, and whether it is decoded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apb.engine.engine import Engine
from apb.engine.handle import KVHandle
from apb.plan.bytes import prefill_bytes
from apb.plan.flops import prefill_flops
from apb.prompt.prompt import Prompt, Question
from bench.ruler.base import Ask, RulerSample
from bench.ruler.prompts import question, target
from bench.ruler.scoring import accuracy

FIRST = 4  # answer tokens whose distributions are compared with full attention's


def measure(
    engine: Engine, sample: RulerSample, prompt: Prompt, full_FV: Tensor | None, *, decode: bool
) -> tuple[dict[str, Any], Tensor]:
    """Prefill a sample and return its row, and the distributions over the first answer tokens.

    ``full_FV``: those of full attention, None where the distance from it is not asked for. The cache is gathered on
    one host, which gives the same tokens for less work. Logarithms are natural; log-probabilities are means over the
    answer's tokens. A prompt without a question is asked the sample's afterwards.
    """
    handle = engine.prefill(prompt)
    sent = handle.metrics["bytes_by_kind"]
    if engine.setup.hosts > 1:
        gathered = handle.gather(0)
        handle.release()
    else:
        gathered = handle
    plan = engine.setup.plan(prompt)
    if prompt.question is None:
        gathered = _asked(gathered, question(engine.setup.tokenizer, sample.ask, chat=sample.chat))
    ids = target(engine.setup.tokenizer, sample.ask)
    score = gathered.score(ids, first=min(FIRST, len(ids)))
    row: dict[str, Any] = {
        "log_prob": score.log_probs.double().mean().item(),
        "answer_tokens": len(ids),
        "kl": None if full_FV is None else divergence(full_FV, score.first),
        "prefill_flops": [prefill_flops(plan, r) for r in range(plan.hosts)],
        "passing_bytes": sum(sent.get(kind, 0) for kind in prefill_bytes(plan, 0)),
        "sent_bytes": sum(sent.values()),
        "anchor_len": plan.anchor_len,
        "passing_len": max(plan.kept_rows),
    }
    second = None
    if sample.second is not None:  # forked first: decoding goes on where the cache stands
        second = gathered.fork(question(engine.setup.tokenizer, sample.second, chat=sample.chat))
    row |= _decoded(engine, gathered, sample.ask) if decode and sample.chat else {}
    gathered.release()
    if second is not None and sample.second is not None:
        again = second.score(target(engine.setup.tokenizer, sample.second))
        row["second_log_prob"] = again.log_probs.double().mean().item()
        found = _decoded(engine, second, sample.second) if decode else {}
        row |= {f"second_{name}": value for name, value in found.items()}
        second.release()
    return row, score.first


def _asked(handle: KVHandle, question: Question) -> KVHandle:
    """Ask a cache its question; the cache goes."""
    asked = handle.fork(question)
    handle.release()
    return asked


def divergence(full_FV: Tensor, other_FV: Tensor) -> float:
    """Return KL(full || other) in nats, the mean over the tokens; both are log-probabilities."""
    p_FV, q_FV = full_FV.double(), other_FV.double()
    return (p_FV.exp() * (p_FV - q_FV)).sum(-1).mean().item()


def _decoded(engine: Engine, handle: KVHandle, ask: Ask) -> dict[str, Any]:
    text = engine.generate(handle, ask.new_tokens).text
    return {"accuracy": accuracy(ask, text), "text": text}
