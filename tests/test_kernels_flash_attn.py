"""The kernel of the optional flash-attn packages: which is chosen, and that torch is told once."""

from __future__ import annotations

from collections.abc import Iterator

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


def machine(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], packages: tuple[str, ...]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash_attn, "_has", lambda module: module in packages)


BOTH = ("flash_attn_interface", "flash_attn.cute")


@pytest.mark.parametrize(
    "capability, packages, name",
    [
        ((9, 0), BOTH, "FA3"),
        ((9, 0), ("flash_attn.cute",), "FA4"),
        ((10, 0), BOTH, "FA4"),
        ((10, 0), ("flash_attn_interface",), None),
        ((8, 0), BOTH, None),
        ((9, 0), (), None),
    ],
)
def test_the_best_for_the_device_is_chosen(
    capability: tuple[int, int],
    packages: tuple[str, ...],
    name: str | None,
    monkeypatch: pytest.MonkeyPatch,
    told: list[str],
) -> None:
    machine(monkeypatch, capability, packages)
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


def test_packages_are_looked_for_without_importing_them() -> None:
    assert flash_attn._has("torch.nn") and not flash_attn._has("no_such_package.inside")
    assert not flash_attn._has("torch.no_such_module")


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
