"""One architecture through adapter and engine: equal to transformers' own whole run, or rejected with a reason.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from apb.models.adapter import Adapter
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from burst.errors import UserError
from tests.support import tiny
from tests.support.families import whole_greedy, whole_logits
from tests.sweep.candidates import Candidate, candidates

EXACT, REJECTED, WRONG, UNBUILT = "exact", "rejected", "WRONG", "cannot be built here"
LIMIT = 1e-4  # of fp32 logits, all of them of size 1 to 10
HOSTS = (1, 2, 3)
CONTEXT, NEW_TOKENS = 112, 8


@dataclass(frozen=True)
class Verdict:
    """The outcome for one type of configuration: ``error`` is the greatest difference of logits where it is exact."""

    model_type: str
    name: str  # of the class
    verdict: str
    words: str = ""  # the reason, or the kinds of its layers
    error: float = 0.0


def judge(model_type: str, name: str) -> Verdict:
    """Return the verdict on one architecture at tiny size: the worst of those on its variants."""
    found = [_judge(model_type, name, make) for make in candidates(model_type)]
    return max(found, key=lambda v: ((EXACT, UNBUILT, REJECTED, WRONG).index(v.verdict), v.error))


def _judge(model_type: str, name: str, make: Callable[[], Candidate]) -> Verdict:
    try:
        candidate = make()
        prompt = small_prompt(candidate.vocab)
        want_SV = whole_logits(candidate.model, prompt.token_ids)
        tokens = whole_greedy(candidate.model, prompt.token_ids, NEW_TOKENS)
    except Exception as error:  # any of 200 foreign models may fail in its own way; the page says how
        return Verdict(model_type, name, UNBUILT, _line(error))
    if not bool(want_SV.isfinite().all()):
        return Verdict(model_type, name, UNBUILT, "its random weights give numbers that are not finite")
    try:
        adapter = candidate.adapt()
    except UserError as error:
        return Verdict(model_type, name, REJECTED, _reason(error))
    except Exception as error:
        return Verdict(model_type, name, WRONG, f"{_line(error)} ({_place(error)})")
    try:
        return _compared(model_type, name, adapter, prompt, want_SV[-1], tokens)
    except UserError as error:  # a model that passed the checks at load must run
        return Verdict(model_type, name, WRONG, f"rejected late: {_reason(error)}")
    except Exception as error:
        return Verdict(model_type, name, WRONG, f"{_line(error)} ({_place(error)})")


def _compared(
    model_type: str, name: str, adapter: Adapter, prompt: Prompt, want_V: Tensor, tokens: tuple[int, ...]
) -> Verdict:
    error = 0.0
    for hosts in HOSTS:
        engine = tiny.tiny_engine(adapter, strategy("full" if hosts == 1 else "ring"), hosts)
        try:
            handle = engine.prefill(prompt)
            differs = float((engine.logits(handle) - want_V).abs().max())
            found = engine.generate(handle, max_new_tokens=NEW_TOKENS).token_ids
        finally:
            engine.close()
        if not differs <= LIMIT:
            return Verdict(model_type, name, WRONG, f"logits differ by {differs:.1e} on {hosts} hosts", differs)
        if found != tokens:
            return Verdict(model_type, name, WRONG, f"tokens {found} for {tokens} on {hosts} hosts", differs)
        error = max(error, differs)
    return Verdict(model_type, name, EXACT, kinds(adapter), error)


def kinds(adapter: Adapter) -> str:
    """Return the kinds of a model's mixers with their numbers, in words."""
    numbers = Counter(kind.name for kind in adapter.shape.mixers)
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()))


def small_prompt(vocab: int) -> Prompt:
    """Return a prompt of 112 + 8 tokens of a vocabulary of any size from 16 on."""
    ids = tiny.random_ids(2400, 7)
    question, context = ([3 + i % (vocab - 3) for i in part] for part in (ids[:8], ids[8 : 8 + CONTEXT]))
    return Prompt(tuple(context), 4, Question(tuple(question[:2]), tuple(question[2:6]), tuple(question[6:]), None))


def _line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:160]}" if words else type(error).__name__


def _reason(error: UserError) -> str:
    return f"{error.message}: {error.given}".replace("\n", " ")


def _place(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(last.filename.split('/')[-3:])}:{last.lineno}"
