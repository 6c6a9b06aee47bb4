"""The kernel of the optional flash-attn packages: which is chosen, and that torch is told once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from burst.errors import UserError
from burst.kernels import cuda, flash_attn, kernel

HERE = torch.device("cuda", 0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What torch is told to activate; the CUDA kernel answers without a GPU."""
    names: list[str] = []
    monkeypatch.setattr(flash_attn, "activate_flash_attention_impl", names.append)
    monkeypatch.setattr(flash_attn, "current_flash_attention_impl", lambda: names[-1] if names else None)
    monkeypatch.setattr(cuda, "attend", lambda q, k, v, causal, scale: (q, k))
    flash_attn._activate.cache_clear()
    yield names
    flash_attn._activate.cache_clear()


@pytest.mark.parametrize(
    "capability, installed, name",
    [
        ((9, 0), ("FA3", "FA4"), "FA3"),
        ((9, 0), ("FA4",), None),
        ((10, 0), ("FA3", "FA4"), "FA4"),
        ((10, 0), ("FA3",), None),
        ((8, 0), ("FA3", "FA4"), None),
        ((9, 0), (), None),
    ],
)
def test_the_best_for_the_device_is_chosen(
    capability: tuple[int, int],
    installed: tuple[str, ...],
    name: str | None,
    monkeypatch: pytest.MonkeyPatch,
    told: list[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash_attn, "installed", lambda: installed)
    assert kernel("auto", HERE, torch.bfloat16).name == ("cuda" if name is None else "flash_attn")
    assert kernel("auto", HERE, torch.float32).name == "cuda", "they take half precision only"
    q = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    if name is None:
        with pytest.raises(UserError, match="no flash-attn 3 or 4"):
            flash_attn._activate(HERE)
        return
    monkeypatch.setattr(flash_attn, "best", lambda device: name)
    for _ in range(2):
        flash_attn.attend(q, q, q, True, 1.0)
    assert told == [name]


@pytest.mark.parametrize("cute, cutlass, found", [(True, True, ("FA4",)), (True, False, ()), (False, True, ())])
def test_a_package_that_cannot_be_imported_is_not_imported(
    cute: bool, cutlass: bool, found: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["flash_attn/__init__.py"] + cute * ["flash_attn/cute/interface.py"] + cutlass * ["cutlass/__init__.py"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise ImportError('undefined symbol')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    flash_attn.installed.cache_clear()
    try:
        assert flash_attn.installed() == found
    finally:
        flash_attn.installed.cache_clear()
    assert "flash_attn" not in sys.modules and "cutlass" not in sys.modules


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_gpu_with_a_package_equals_the_reference(dim: int, causal: bool) -> None:
    if flash_attn.best(HERE) is None:
        pytest.skip("no flash-attn 3 or 4 for this device")
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 130, dim, generator=gen).to(HERE, torch.bfloat16) for heads in (8, 2, 2))
    got = kernel("flash_attn")(q, k, v, causal=causal)
    want = kernel("reference")(q.double(), k.double(), v.double(), causal=causal)
    for mine, theirs, atol in zip(got, want, (2e-2, 1e-3), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=atol, rtol=0)
