"""Options of an engine: everything that is said before its hosts start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from apb.compress.base import Compressor
from apb.draft.spec import DraftSpec
from apb.strategies.base import Strategy
from burst.errors import in_range
from burst.registry import option

MOST_YARN = 64  # what models are published with is up to 32


@dataclass(frozen=True)
class EngineOptions:
    """A model and a way to prefill it. Raises UserError for numbers out of range.

    ``strategy`` and ``compress`` are names, or what ``apb.strategies.strategy`` and ``apb.compress.compressor`` make;
    ``draft`` is a name, a path or a DraftSpec.
    """

    model: str = option(
        "smollm2-135m", "a name, a folder with config.json, or a hub id 'organisation/model'", text=True
    )
    hosts: int | None = option(None, "hosts that share the context; null: 4 (full: 1)")
    strategy: str | Strategy = option("apb", "how the context is spread over the hosts")
    compress: str | Compressor | None = option(
        None, "which rows are passed on; null: the strategy's own (query for apb)"
    )
    dtype: str = option(
        "auto", "float32, bfloat16, float16 or float64; auto: the model's own on a GPU, float32 on a CPU"
    )
    device: str = option("auto", "cpu, cuda or cuda:N; auto: the GPU where there is one")
    threads: int = option(1, "CPU threads a host; more than are idle are many times slower")
    timeout_s: float = option(600.0, "seconds that a host may be silent, or its work stand still")
    chunk_tokens: int | None = option(None, "tokens a host runs through a layer at once; null: its whole block")
    max_positions: int | None = option(None, "positions the model takes; null: as its configuration says")
    yarn: int | Literal["auto"] | None = option(
        None,
        "factor of YaRN for models with plain RoPE, a whole number; auto: the smallest that has room for prompt and "
        "answer; null: as the model's configuration says",
    )
    draft: str | DraftSpec | None = option(None, "the head that decode=eagle2 drafts with; null: none")
    graphs: bool = option(True, "steps of decoding as CUDA graphs between calls of attention, on GPUs")

    def __post_init__(self) -> None:
        whole = "a whole number, 1 or more"
        for name in ("hosts", "chunk_tokens", "max_positions"):
            value = getattr(self, name)
            in_range(name, value, value is None or _whole(value), f"{whole}, or None")
        fits = self.yarn in (None, "auto") or (type(self.yarn) is int and 1 <= self.yarn <= MOST_YARN)
        in_range("yarn", self.yarn, fits, f"a whole number, 1 to {MOST_YARN}, auto, or None")
        in_range("threads", self.threads, _whole(self.threads), whole)
        timeout = self.timeout_s
        in_range("timeout_s", timeout, math.isfinite(timeout) and timeout > 0, "more than 0 seconds")


def _whole(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31
