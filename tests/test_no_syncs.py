"""Selecting, passing and attending never ask the device for a value: a GPU's queue is never waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apb.prefill import PrefillAttention
from apb.strategies import strategy
from tests.tiny import make_prompt, tiny_engine, tiny_llama

# What reads a tensor's values on the host, or makes a tensor whose size depends on them.
SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "_unique2")


class NoSyncs(TorchDispatchMode):
    """Refuses operators that wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in SYNCS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_syncs() -> None:
    with NoSyncs(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(1).sum() > 0)


@pytest.mark.parametrize("compress", ["query", "norm", "snapkv", "expected", "recent", "random"])
@pytest.mark.parametrize("name", ["apb", "spava"])
def test_layers_of_a_prefill_wait_for_nothing(name: str, compress: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called, inside = PrefillAttention.__call__, []

    def watched(self: PrefillAttention, *args: Any) -> Any:
        inside.append(args[0])
        with NoSyncs():
            return called(self, *args)

    monkeypatch.setattr(PrefillAttention, "__call__", watched)
    engine = tiny_engine(tiny_llama(torch.float32), strategy(name), 3, compress)
    engine.prefill(make_prompt(200))
    assert len(inside) == 3 * 3  # hosts and layers


@pytest.mark.gpu
@pytest.mark.parametrize("compress", ["query", "norm"])
def test_selection_does_not_stop_a_gpu(compress: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selected = PrefillAttention._selected

    def watched(self: PrefillAttention, *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return selected(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(PrefillAttention, "_selected", watched)
    adapter = tiny_llama(torch.float32)
    adapter._model.to("cuda")
    try:
        engine = tiny_engine(adapter, strategy("apb"), 3, compress, device="cuda")
        engine.prefill(make_prompt(200))
    finally:
        adapter._model.to("cpu")
