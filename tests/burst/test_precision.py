"""In bfloat16 and float16 every log-sum-exp, and every sum of partial outputs, is float32 from kernel to kernel."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.strategies import strategy
from burst.kernels.merge import Accumulator
from tests.support.tiny import adapt, llama_config, make_prompt, tiny_engine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["star", "apb", "spava", "ring", "burst", "ulysses"])
def test_no_lse_and_no_sum_is_rounded(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    add, finish, seen = Accumulator.add, Accumulator.finish, Counter[str]()

    def added(self: Accumulator, out: Tensor, lse: Tensor, rows: slice | None = None) -> None:
        seen[f"lse of a part {lse.dtype}"] += 1
        merged = self.ready
        add(self, out, lse, rows)
        assert self._out_BHSE is not None and self._lse_BHS is not None
        seen[f"lse {self._lse_BHS.dtype}"] += 1
        if merged:
            seen[f"sum {self._out_BHSE.dtype}"] += 1

    def finished(self: Accumulator, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = finish(self, *args)
        seen[f"result's lse {lse.dtype}"] += 1
        return out, lse

    monkeypatch.setattr(Accumulator, "add", added)
    monkeypatch.setattr(Accumulator, "finish", finished)
    engine = tiny_engine(adapt(llama_config(), dtype), strategy(name), 3, "query" if name in ("apb", "spava") else None)
    handle = engine.prefill(make_prompt(200))
    engine.generate(handle, max_new_tokens=3)
    kinds = ("lse of a part", "lse", "sum", "result's lse")
    assert set(seen) == {f"{kind} torch.float32" for kind in kinds}, seen
