"""The fused merge: Triton's interpreter where there is no GPU, and the kernel itself where there is one."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch

import burst.kernels.merge as merging
from burst.kernels import kernel
from burst.kernels.merge import Accumulator, merge

TOLERANCE = 5e-6
CASES = ("fp32", "fp32, odd sizes, groups", "bf16, groups", "fp16, groups", "one query", "wide")
ROUNDING = {"bf16": 2e-2, "fp16": 2e-3, "one query": 2e-2}  # of the parts that are merged, by a case's first word


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the interpreter computed, all cases in one process."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.fused_interpreted"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert set(found["cases"]) == set(CASES)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_fp64(name: str, interpreted: dict[str, Any]) -> None:
    case = interpreted["cases"][name]
    assert case["out"] < TOLERANCE and case["lse"] < TOLERANCE
    rounding = next((most for first, most in ROUNDING.items() if name.startswith(first)), TOLERANCE)
    assert case["dense"] < rounding and case["dense_lse"] < TOLERANCE
    assert case["dtypes"] == ["torch.float32", "torch.float32"]
    assert case["in_place"] == name.startswith(("fp32", "wide")), "fp32 sums are merged into, narrower parts are not"
    assert case["in_place"] or case["untouched"]


def test_edges(interpreted: dict[str, Any]) -> None:
    edges = interpreted["edges"]
    # Empty on the left, on the right, on both sides; far apart either way; NaN; and between two numbers.
    assert edges["out"][:6] == ["10.0", "2.0", "0.0", "40.0", "5.0", "nan"]
    assert edges["lse"][:6] == ["2.0", "1.0", "-inf", "300.0", "300.0", "nan"]
    assert abs(float(edges["out"][6]) - (7 + 63 / (1 + math.e))) < 1e-5
    assert edges["nan_stays"], "a NaN must stay where it is, and nowhere else"
    assert edges["rows"] == [0.0, 0.0, 0.5, 0.5, 0.5, 0.0] and edges["same_memory"]
    assert edges["no_rows"] == [1, 2, 0, 8]


def test_only_cuda_tensors_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_has_triton", lambda: pytest.fail("asked for tensors of a CPU"))
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    merge([(out, lse), (out, lse)])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "named, there, found",
    [
        (None, {"gcc"}, True), (None, {"clang"}, True), (None, set(), False), ("my-cc", {"my-cc"}, True),
        ("my-cc", {"gcc"}, False),
    ],
)  # fmt: skip
def test_triton_needs_a_compiler(
    named: str | None, there: set[str], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = importlib.import_module("triton.knobs")
    monkeypatch.setattr(knobs.build, "cc", named)
    monkeypatch.setattr(merging.shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    merging._has_triton.cache_clear()
    assert merging._has_triton() == found
    merging._has_triton.cache_clear()


def test_a_lone_part_is_not_widened() -> None:
    out, lse = torch.ones(1, 2, 3, 4, dtype=torch.bfloat16), torch.zeros(1, 2, 3)
    total = Accumulator()
    total.add(out, lse)
    assert total.finish(torch.bfloat16)[0] is out
    assert total.finish()[0].dtype == torch.float32
    total.add(3 * out, lse)
    assert torch.equal(total.finish()[0], torch.full(out.shape, 2.0)) and out.max() == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 129])
def test_a_gpu_merges_as_torch_does(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, rows, 96, generator=gen, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 100, 96, generator=gen, dtype=torch.float64)
    attend = kernel("reference")
    parts = []
    for start, stop in ((0, 40), (40, 40), (40, 41), (41, 100)):
        out, lse = attend(q, k[:, :, start:stop], v[:, :, start:stop], causal=False)
        parts.append((out.to("cuda", dtype), lse.to("cuda", torch.float32)))
    out, lse = merge(parts)
    monkeypatch.setattr(merging, "_has_triton", lambda: False)
    want, want_lse = merge(parts)
    torch.testing.assert_close(out, want, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=TOLERANCE, rtol=0)
