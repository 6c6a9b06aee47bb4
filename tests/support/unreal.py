"""Hosts without values: models on torch's meta device run as on a GPU, with the CUDA kernel, at any size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apb.compress import compressor
from apb.draft.spec import DraftSpec
from apb.engine.requests import prefill_request
from apb.engine.setup import Setup
from apb.host.host import Host
from apb.host.messages import HostSpec
from apb.models.adapter import Adapter
from apb.models.ends import Ends
from apb.models.rotation import Rotation, Turn, _whole
from apb.models.shape import model_shape
from apb.plan.draft import Handoff
from apb.plan.plan import PrefillPlan
from apb.prompt.prompt import Prompt
from apb.strategies import strategy
from burst.kernels import cuda
from burst.kernels.base import Kernel
from burst.transport import Transport, VirtualWorld
from tests.support.tiny import byte_tokenizer

KERNEL = Kernel("cuda", cuda.attend, cuda.backward)  # without its check that tensors are on a GPU


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CUDA kernel take flash attention, and hosts agree without reading what they gathered."""
    monkeypatch.setattr(cuda, "_has_flash", lambda device: True)
    monkeypatch.setattr(Transport, "agree", lambda self, text, **options: None)


def unprobed(turn: Turn) -> Callable[[Adapter, Any, Rotation], Ends]:
    """Return what stands in for the probe, which compares values; ``turn``: how all mixers turn queries and keys."""

    def probe(adapter: Adapter, model: Any, rotation: Rotation) -> Ends:
        rotation._turns |= dict.fromkeys(range(len(adapter.shape.mixers)), turn)
        return Ends()

    return probe


def without_values(config: Any, turn: Turn = _whole) -> Adapter:
    """Return a bfloat16 model without values."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb.models.adapter.probe", unprobed(turn))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        return Adapter(model, model_shape(config, torch.bfloat16))


def prefill(
    adapter: Adapter,
    prompt: Prompt,
    hosts: int,
    name: str,
    select: str | None = None,
    *,
    chunk: int | None = None,
    handoff: Handoff | None = None,
    within: Callable[[int], AbstractContextManager[Any]] = lambda rank: nullcontext(),
    **options: Any,
) -> PrefillPlan:
    """Prefill on hosts without values, each in the context that ``within`` gives for its rank; return the plan."""
    spec = HostSpec("unreal", "bfloat16", "cpu", draft=DraftSpec("unreal") if handoff is not None else None)
    scorer = compressor(select) if select else None
    made = strategy(name, **options)
    setup = Setup(spec, adapter.shape, byte_tokenizer(), made, scorer, hosts, chunk_tokens=chunk, handoff=handoff)
    plan = setup.plan(prompt)

    def run(t: Transport) -> None:
        host = Host(spec, t, adapter)
        host.kernel = KERNEL
        request = prefill_request("it", prompt, plan, scorer, t.rank)
        with torch.inference_mode(), within(t.rank):
            host._prefill(request)

    VirtualWorld(hosts, device="meta").run(run)
    return plan
