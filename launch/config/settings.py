"""Settings of the verbs as dataclasses: every key, its default and its help text are declared here, once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from apb.clusters import Launcher
from apb.compress import Compressor
from apb.decode.base import Decoder
from apb.decode.sampling import Sampling
from apb.draft.spec import DraftSpec
from apb.engine.options import EngineOptions
from apb.plan.memory import Generation
from apb.strategies import Strategy
from burst.errors import in_range
from burst.registry import option, same
from launch.config.fields import choice

COMPRESS = "null: the strategy's own (query for apb)"


@dataclass(frozen=True)
class DecodeSettings:
    """Settings that every decoder has; ``decoder`` has its own options, ``draft`` those of its head, if it has one."""

    name: str
    decoder: Decoder
    max_new_tokens: int = option(64, "longest answer, in tokens")
    temperature: float = same(Sampling, "temperature")
    top_p: float = same(Sampling, "top_p")
    top_k: int = same(Sampling, "top_k")
    seed: int = same(Sampling, "seed")
    stop: tuple[str, ...] = option(
        (), "texts that end the answer; one text is taken as it is, several as ['a','b']", text=True
    )
    graphs: bool = same(EngineOptions, "graphs")
    placement: Literal["sharded", "gathered", "auto"] = option(
        "sharded", "sharded: over the hosts as the cache is stored; gathered: on one host; auto: by measured links"
    )
    draft: DraftSpec | None = None

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_p, self.top_k, self.seed)
        in_range("decode.max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")
        in_range("decode.stop", list(self.stop), all(self.stop), "texts of at least one character")

    @property
    def answer(self) -> Generation:
        """The answer that memory has to hold."""
        return Generation(self.max_new_tokens, self.decoder.tree_tokens, self.placement == "gathered")


@dataclass(frozen=True)
class HeadSettings:
    """The head that a decoder drafts with."""

    head: str | None = option(
        None,
        "a shipped head's name, a file, or a folder with a published head; null: the one shipped for the model",
        text=True,
    )


@dataclass(frozen=True)
class BurstSettings:
    """Settings of the planner of exact schedules."""

    explain: bool = option(
        False, "true: show time, exposed communication and bytes of each schedule, and why one is the fastest"
    )
    nodes: int = option(1, "machines that the hosts are spread over, evenly")
    machine: str = option("auto", "speeds to assume, cpu or cuda; auto: those of the device")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Settings of every verb."""

    out: str | None = option(
        None, "folder for result.json, config.yaml and apb.log; null: nothing is written", text=True
    )


@dataclass(frozen=True, kw_only=True)
class Basics(Kept):
    """Settings of every verb that prefills. ``config``: the configuration of a model with random weights."""

    model: str = choice("model", "smollm2-135m")
    strategy: Strategy = choice("strategy", "apb")
    compress: Compressor | None = choice("compress", None, COMPRESS)
    cluster: Launcher = choice("cluster", "ray")
    dtype: str = same(EngineOptions, "dtype")
    device: str = same(EngineOptions, "device")
    max_positions: int | None = same(EngineOptions, "max_positions")
    yarn: int | Literal["auto"] | None = same(EngineOptions, "yarn")
    timeout_s: float = same(EngineOptions, "timeout_s")
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        timeout, positions = self.timeout_s, self.max_positions
        in_range("timeout_s", timeout, math.isfinite(timeout) and timeout > 0, "more than 0 seconds")
        in_range("yarn", self.yarn, not isinstance(self.yarn, int) or self.yarn >= 1, "auto, null, or 1 and more")
        in_range("max_positions", positions, positions is None or 1 <= positions < 2**31, "1 or more")


@dataclass(frozen=True, kw_only=True)
class Settings(Basics):
    """Settings of every verb that reads a document and a question; ``memory_gb`` is plan's alone."""

    decode: DecodeSettings = choice("decode", "autoregressive")
    chunk_tokens: int | Literal["auto"] | None = option(
        "auto", "tokens a host runs through a layer at once; null: its whole block; auto: that, or what memory allows"
    )
    chat: bool = option(True, "put document and question into the model's chat template")
    question_first: bool = option(
        False, "put the question before the document as well, where every host sees it and the cache keeps it"
    )
    needle_depth: float = option(0.5, "where the built-in document (no -d) hides its fact: 0.0 start to 1.0 end")
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        chunk, depth = self.chunk_tokens, self.needle_depth
        in_range("chunk_tokens", chunk, not isinstance(chunk, int) or chunk >= 1, "auto, null, or 1 and more")
        in_range("needle_depth", depth, 0 <= depth <= 1, "0.0 to 1.0")


@dataclass(frozen=True, kw_only=True)
class AskSettings(Settings):
    """Settings of ``apb ask``."""

    compare: bool = option(False, "run full attention on one host too, and show both")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """Settings of ``apb plan``."""

    burst: BurstSettings = choice("burst", "planner")
    context_tokens: int | None = option(
        None,
        "plan for this many tokens instead of a document (chat template's head and a copy of the question included)",
    )
    query_tokens: int = option(64, "question and template tail, in tokens; read with context_tokens only")
    memory_gb: float | None = option(
        None, "memory of each host's own machine or GPU, in GB (10^9 bytes); null: what is free on this machine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens, memory = self.context_tokens, self.memory_gb
        in_range("context_tokens", tokens, tokens is None or tokens >= 1, "1 or more")
        in_range("memory_gb", memory, memory is None or (math.isfinite(memory) and memory > 0), "more than 0")
