"""Messages between an engine and its hosts: what a host needs to start, what it is asked, what it reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from apb.compress.base import Compressor
from apb.decode.base import Decoded
from apb.draft.spec import DraftSpec
from apb.plan.plan import PrefillPlan

OnEvent = Callable[[dict[str, Any]], None]  # {"kind": "layer", "done", "total"} or {"kind": "token", "id"}; host 0 only


@dataclass(frozen=True)
class HostSpec:
    """Specification of a host, sent to remote hosts as it is."""

    model_path: str
    dtype: str  # a concrete type: "float32", "bfloat16", "float16", "float64"
    device: str  # "cpu", "cuda", "cuda:N"
    kernel: str = "auto"
    threads: int = 1  # intra-op threads a host
    draft: DraftSpec | None = None
    timeout_s: float = 600.0  # every wait's deadline
    config: Mapping[str, Any] | None = None  # random weights of this configuration; model_path is then only a name
    graphs: bool = True  # decode steps as CUDA graphs, on CUDA devices
    yarn: int | None = None  # factor that RoPE is stretched by; None: as the model's configuration says


@dataclass(frozen=True)
class PrefillRequest:
    """One host's share of a prefill. ``anchor_ids``: the anchor's tokens that it runs; ``block_ids``: its spans'."""

    handle: str
    plan: PrefillPlan
    compressor: Compressor | None
    anchor_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    question_delta: int
    query_ids: tuple[int, ...]  # empty: no query phase
    next_ids: tuple[int, ...] = ()  # the token after each of those that the draft head takes over

    @property
    def agreement(self) -> str:
        """Description of everything that must be alike on all hosts: all but each host's own tokens."""
        scorer = self.compressor
        options = {f.name: repr(getattr(scorer, f.name)) for f in fields(scorer) if f.compare} if scorer else {}
        shared = (self.handle, scorer and scorer.name, options, self.question_delta, self.query_ids)
        return self.plan.digest + json.dumps(shared, sort_keys=True)


@dataclass
class HostReport:
    """Report of one host after a call. ``query_s``: seconds of ``wall_s`` that the question's own pass took."""

    work_s: float  # its own compute, waiting for peers left out
    wall_s: float  # first layer to the end of the call
    bytes_by_kind: dict[str, int]
    bytes_by_link: dict[str, int]
    rss_bytes: int  # resident size of the process when the call began
    peak_rss_bytes: int  # and at its peak during the call
    peak_device_bytes: int = 0  # the most that tensors took on the GPU during the call
    query_s: float = 0.0
    decoded: Decoded | None = None
