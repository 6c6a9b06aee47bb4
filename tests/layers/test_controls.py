"""Controls of the matrix: what breaks a mechanism on purpose is seen in logits or tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from pytest import MonkeyPatch

from apb.layers.window import WindowPrefill
from tests.support import matrix
from tests.support.matrix import Cell, run

CELL: dict[str, Any] = {"context": 131, "tokens": 4}


def empty_halos(patch: MonkeyPatch) -> None:
    real = WindowPrefill._exchange

    def exchange(self: Any, *given: Any) -> Any:
        arrived, at = real(self, *given)
        if arrived is not None:
            arrived.k_BKTD.zero_()
            arrived.v_BKTE.zero_()
        return arrived, at

    patch.setattr(WindowPrefill, "_exchange", exchange)


def no_sinks(patch: MonkeyPatch) -> None:
    from apb.layers import full, partials, window

    for module in (full, window):
        patch.setattr(module, "finish", lambda merged, dtype, sinks: partials.finish(merged, dtype, None))


def sinks_in_every_part(patch: MonkeyPatch) -> None:
    """A sink that each host adds to its own part of the keys is counted once a host."""
    from apb.layers import full, partials
    from burst.kernels.merge import Accumulator

    sinks: list[Any] = []

    def finish(merged: Accumulator, dtype: Any, sinks_H: Any) -> Any:
        sinks[:] = [sinks_H]
        return partials.finish(merged, dtype, sinks_H)

    def merge_all(own: Accumulator, dtype: Any, transport: Any, step: str) -> Accumulator:
        if transport.rank and sinks and sinks[0] is not None:
            out_BHSE, lse_BHS = own.finish()
            partials.add_sinks(out_BHSE, lse_BHS, sinks[0])
            own = Accumulator()
            own.add(out_BHSE, lse_BHS)
        return partials.merge_all(own, dtype, transport, step)

    patch.setattr(full, "finish", finish)
    patch.setattr(full, "merge_all", merge_all)


def no_temperature(patch: MonkeyPatch) -> None:
    patch.setattr("apb.models.adapter.by_temperature", lambda module, q_BHSD: q_BHSD)


def no_agreed_length(patch: MonkeyPatch) -> None:
    patch.setattr("apb.host.host.agreed", lambda length: contextlib.nullcontext())


CONTROLS: dict[str, tuple[str, Callable[[MonkeyPatch], None], Cell]] = {
    "halos of nothing": ("logits, prefill", empty_halos, Cell("mistral-window", 3, **CELL)),
    "no sinks": ("logits, prefill", no_sinks, Cell("gpt_oss", 3, **CELL)),
    "a sink a host": ("logits, second question", sinks_in_every_part, Cell("gpt_oss", 3, reuse=True, **CELL)),
    "no temperature by position": ("logits, prefill", no_temperature, Cell("llama4", 3, **CELL)),
    "no agreed length": ("logits, prefill", no_agreed_length, Cell("phi3-longrope", 3, **CELL)),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_what_is_broken_is_seen(name: str, monkeypatch: MonkeyPatch) -> None:
    words, broken, cell = CONTROLS[name]
    assert not run(cell).failed
    broken(monkeypatch)
    failed = run(cell).failed
    assert any(failure.startswith(words) for failure in failed), failed
    assert not any(failure.startswith("raised") for failure in failed), failed


def test_a_ruined_reference_is_seen(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "greedy", lambda family, prompt, count: (3,) * count)
    assert any(failure.startswith("tokens") for failure in run(Cell("qwen3_next", 2, **CELL)).failed)
