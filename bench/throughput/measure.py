"""One prefill and a few decoded tokens on a real cluster, taken apart."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from apb.engine.engine import Engine
from apb.engine.setup import Setup
from apb.plan.flops import prefill_flops, query_flops
from apb.plan.plan import PrefillPlan
from apb.prompt.prompt import Prompt
from bench.kernels.measure import Device
from bench.tools.prompts import lengths, random_prompt
from bench.tools.prose import reference

QUESTION = "Which statement binds names?"


class EveryToken(Engine):
    """An engine that decodes as many tokens as it is asked for."""

    def _stop_ids(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Source:
    """Source of prompts: text that is tokenised each time, or token ids where there is no tokenizer."""

    setup: Setup
    tokens: int
    query: int

    def __post_init__(self) -> None:
        if self.setup.tokenizer is not None:
            object.__setattr__(self, "_text", self._cut())

    def prompt(self) -> Prompt:
        """Make the prompt. Raises UserError where there is no room for one."""
        if self.setup.tokenizer is None:
            return random_prompt(lengths(self.tokens, self.query), self.setup.shape.vocab)
        return self.setup.prompt(self._text, QUESTION, chat=self._chat)  # type: ignore[attr-defined]

    @property
    def _chat(self) -> bool:
        return bool(getattr(self.setup.tokenizer, "chat_template", None))

    def _cut(self) -> str:
        """The longest beginning of the reference text, repeated as need be, whose prompt has at most the tokens."""
        text = reference()
        text *= 1 + 8 * self.tokens // len(text)  # no tokenizer needs more than some eight letters a token
        low, high = 1, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self.setup.prompt(text[:middle], QUESTION, chat=self._chat).token_ids) <= self.tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        return text[:low]


def measure(engine: Engine, source: Source, new_tokens: int) -> dict[str, Any]:
    """Tokenise, prefill, ask and decode once and return seconds, rates, memory and bytes.

    ``ttft_s`` is the sum of its four parts: ``tokenise_s``; ``ship_s``: planning, sending the hosts their tokens,
    hearing from them; ``prefill_s``: the context, slowest host; ``first_step_s``: the question's pass and the first
    token.
    """
    start = time.perf_counter()
    prompt = source.prompt()
    tokenise_s = time.perf_counter() - start if source.setup.tokenizer is not None else 0.0
    handle = engine.prefill(prompt, max_new_tokens=new_tokens)
    result = engine.generate(handle, new_tokens)
    engine.release(handle)
    before, after = handle.metrics, result.metrics
    prefill_s = before["prefill_s"] - before["query_s"]
    return {
        "prompt_tokens": len(prompt.token_ids),
        "ttft_s": tokenise_s + after["ttft_s"],
        "tokenise_s": tokenise_s,
        "ship_s": before["request_s"] - before["prefill_s"],
        "prefill_s": prefill_s,
        "first_step_s": before["query_s"] + after["ttft_s"] - before["request_s"],
        "prefill_tokens_per_s": len(prompt.context_ids) / prefill_s,
        "decode_tokens_per_s": after["decode_tokens_per_s"],
        "host_work_s": before["host_work_s"],
        "peak_rss_bytes": after["peak_rss_bytes"],
        "peak_device_bytes": before["peak_device_bytes"],
        "bytes_sent": before["bytes_sent"],
        "bytes_by_link": before["bytes_by_link"],
        "bytes_by_kind": before["bytes_by_kind"],
    }


def utilisation(row: dict[str, Any], plan: PrefillPlan, device: Device, virtual: bool) -> dict[str, Any]:
    """Return what the device could have done: the busiest host's FLOPs against its rates.

    ``seconds``: the hosts' wall time to the question's end; of virtual hosts, which take turns, the busiest one's own
    work. ``flops_utilisation``: of a large matrix product's rate; ``share_of_limit``: of the seconds that its
    projections and its attention take at the rates of one call of each at these sizes.
    """
    s, m = plan.shape, plan.lengths.query
    seconds = max(row["host_work_s"]) if virtual else row["prefill_s"] + row["first_step_s"]
    least, most = 0.0, 0
    for rank, host in enumerate(plan.host_plans):
        flops = prefill_flops(plan, rank) + query_flops(plan, rank)
        linear = 2 * s.linear_params * (host.tokens_run + m)
        limit = linear / device.linear(host.tokens_run) + (flops - linear) / device.causal(host.block_len)
        least, most = max(least, limit), max(most, flops)
    return {
        "seconds": seconds,
        "seconds_of": "own work of the busiest host" if virtual else "wall time",
        "flops_busiest": most,
        "flops_utilisation": most / seconds / device.matrix_rate,
        "limit_s": least,
        "share_of_limit": least / seconds,
    }
