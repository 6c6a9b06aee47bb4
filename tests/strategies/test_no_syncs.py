"""A prefill's layers never ask the device for a value, and give it none: a GPU's queue is never waited for.

Hosts run on torch's meta device with the CUDA kernel: tensors without values, which nobody can read. What reads them
on a GPU fails here, and so does what makes a tensor elsewhere and moves it.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apb.compress.heads import Head, RetainingHeads
from apb.compress.retaining import Retaining
from apb.decode.eagle2 import Eagle2, _TreeDrafter
from apb.decode.tree import capacity
from apb.draft.cache import DraftCache
from apb.draft.draft import Draft
from apb.draft.steps import HeadSteps
from apb.layers.rows import LayerKV
from apb.models.adapter import Adapter
from apb.plan.draft import Handoff
from apb.strategies import strategy
from burst.transport import VirtualWorld
from tests.support import unreal
from tests.support.drafting import SINKS, WINDOW, draft_head
from tests.support.tiny import adapt, llama_config, make_prompt, tiny_engine, tiny_llama

UPLOADS = (torch.tensor, torch.as_tensor, torch.from_numpy)
EXACT = ("full", "ring", "burst", "allgather", "ulysses", "usp")
SELECTING = ("query", "norm", "snapkv", "expected", "recent", "retaining")


class NoValues(TorchDispatchMode):
    """Refuses operators that touch a tensor off the device; those that need values fail by themselves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        elsewhere = [x.device.type for x in touched if x.device.type != "meta"]
        assert not elsewhere, f"{func} touches a tensor on {elsewhere[0]}"
        return out


class NoUploads(TorchFunctionMode):
    """Refuses what makes a tensor of the host's values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in UPLOADS, f"{func.__name__} copies to the device and waits"
        return func(*args, **(kwargs or {}))


@functools.cache
def device_adapter() -> Adapter:
    """A bfloat16 model with a draft head, without values."""
    adapter = adapt(llama_config(), torch.bfloat16)
    adapter._model.to("meta")
    adapter.draft = Draft(draft_head(adapter).to("meta"))
    return adapter


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Watch every pass through the model, from embedding to logits; the list tells what ran."""
    device_adapter()
    passes: list[str] = []
    forward = Adapter._forward

    def run(self: Adapter, module: Any, ids_S: Tensor, positions_S: Tensor, attention: Any, **options: Any) -> Any:
        passes.append(type(attention).__name__)
        with NoUploads(), NoValues():
            return forward(self, module, ids_S, positions_S, attention, **options)

    monkeypatch.setattr(Adapter, "_forward", run)
    unreal.pretend(monkeypatch)
    yield passes


def prefill(
    name: str, select: str | None = None, chunk: int | None = None, draft: bool = False, **options: Any
) -> None:
    """Prefill 400 tokens and a question on hosts without values."""
    handoff = Handoff(WINDOW, SINKS, 2, 16, 2, 0, 64, 0, 0) if draft else None
    hosts = 1 if name == "full" else 4
    unreal.prefill(device_adapter(), make_prompt(400), hosts, name, select, chunk=chunk, handoff=handoff, **options)


def test_the_modes_see_reads_and_uploads() -> None:
    with NoValues(), pytest.raises(Exception, match="meta"):
        bool(torch.ones(1, device="meta") > 0)
    with NoValues(), pytest.raises(AssertionError, match="cpu"):
        torch.ones(2).to("meta")
    with NoUploads(), pytest.raises(AssertionError, match="tensor copies"):
        torch.tensor([1], device="meta")
    with pytest.raises(NotImplementedError):
        torch.ones(3, device="meta")[torch.ones(3, dtype=torch.bool, device="meta")]


@pytest.mark.parametrize("chunk", [None, 48])
@pytest.mark.parametrize("name", EXACT)
def test_exact_prefills(name: str, chunk: int | None, watched: list[str]) -> None:
    prefill(name, chunk=chunk, draft=name in ("full", "ring"))
    assert {"CacheAttention"} < set(watched)


@pytest.mark.parametrize("select", SELECTING)
@pytest.mark.parametrize("name", ["apb", "spava"])
def test_approximate_prefills(name: str, select: str, watched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    s = device_adapter().shape
    heads = [
        Head(torch.empty(s.heads.kv_heads, (s.heads.q_heads + 2 * s.heads.kv_heads) * s.heads.qk_dim, device="meta"))
    ] * s.layers
    found = RetainingHeads(tuple(heads), 1, "raw", {})
    monkeypatch.setattr("apb.compress.retaining.load", lambda file: found)
    monkeypatch.setattr("apb.compress.retaining.find", lambda name: name)
    monkeypatch.setattr(Retaining, "check", lambda self, shape: None)
    prefill(name, select, draft=select == "query")
    assert ("WithQuestion" if name == "spava" else "PrefillAttention") in watched


@pytest.mark.parametrize("name", ["star", "apb", "spava"])
def test_prefills_in_chunks(name: str, watched: list[str]) -> None:
    prefill(name, "query" if name != "star" else None, chunk=48, draft=True)
    assert "InChunks" in watched


@pytest.mark.parametrize(
    "options", [{"passing": "allgather"}, {"anchor": "shared"}, {"passing": "allgather", "anchor": "shared"}]
)
def test_other_routes(options: dict[str, str], watched: list[str]) -> None:
    prefill("apb", "query", **options)
    assert watched


def test_a_tree_grows_without_waiting() -> None:
    draft = device_adapter().draft
    assert draft is not None
    like = draft.head.target.embedding_WE
    rows = LayerKV(*(like.new_empty(1, 2, 30, 16) for _ in range(2)))
    cache = DraftCache(draft, rows, range(30), 30, None)
    drafter = _TreeDrafter(Eagle2(depth=4, width=3, tokens=10), cache, None, HeadSteps(draft.head))
    out_BSE, log_probs_FV = like.new_empty(1, 1, 64), like.new_empty(1, len(like)).float()
    with torch.inference_mode(), NoUploads(), NoValues():
        pool = drafter._grow(out_BSE, log_probs_FV, 30, 4)
    assert len(pool) == capacity(4, 3) and pool.tokens_N.device.type == "meta"


def test_what_must_wait_is_known(watched: list[str]) -> None:
    """Random scores are drawn on the CPU."""
    with pytest.raises(AssertionError, match="cpu"):
        prefill("apb", "random")


@pytest.mark.gpu
@pytest.mark.parametrize("name, select", [("apb", "query"), ("apb", "norm"), ("spava", "query"), ("ring", None)])
def test_layers_do_not_stop_a_gpu(name: str, select: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own word: nothing waits but the virtual hosts, when they hand over."""
    forward, hand_over, inside = Adapter._forward, VirtualWorld.hand_over, threading.local()

    def watched(self: Adapter, *args: Any, **options: Any) -> Any:
        inside.mode = "error"
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(self, *args, **options)
        finally:
            inside.mode = "default"
            torch.cuda.set_sync_debug_mode("default")

    def others(self: VirtualWorld, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        try:
            hand_over(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode(getattr(inside, "mode", "default"))

    adapter = copy.copy(tiny_llama(torch.float32))
    adapter._model.to("cuda")
    try:
        engine = tiny_engine(adapter, strategy(name), 3, select, device="cuda")
        engine.prefill(make_prompt(200))  # first calls set kernels up, and may wait
        monkeypatch.setattr(Adapter, "_forward", watched)
        monkeypatch.setattr(VirtualWorld, "hand_over", others)
        engine.prefill(make_prompt(200))
    finally:
        adapter._model.to("cpu")
