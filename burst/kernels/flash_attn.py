"""flash-attn 3 or 4 where one is installed: torch puts their kernels behind the flash operators that ``cuda`` calls.

flash-attn 2 would add nothing: torch's own operators are built from it. The choice holds for the whole process.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

from burst.errors import UserError
from burst.kernels import cuda
from burst.kernels.base import Rows, backend

# By the device's major capability: FA3 is written for Hopper, FA4 for Blackwell (on Hopper it may not split its work).
CHOICES = {9: "FA3", 10: "FA4"}


@cache
def installed() -> tuple[str, ...]:
    """Return which of the implementations are there; none is imported, a broken one harms nobody who asks."""
    found = {"FA3": importlib.util.find_spec("flash_attn_interface") is not None, "FA4": _has_fa4()}
    return tuple(name for name, there in found.items() if there)


def best(device: torch.device) -> str | None:
    """Return the implementation for a CUDA device; None: torch's own."""
    found = installed()
    name = CHOICES.get(torch.cuda.get_device_capability(device)[0]) if found else None
    return name if name in found else None


def attend(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As ``cuda.attend``, by flash-attn's kernels; raises UserError where there are none for the device."""
    _activate(q_BHSD.device)
    return cuda.attend(q_BHSD, k_BKTD, v_BKTE, causal, scale)


def backward(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, rows: Rows, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``cuda.backward``, by flash-attn's kernels."""
    _activate(q_BHSD.device)
    return cuda.backward(q_BHSD, k_BKTD, v_BKTE, rows, causal, scale)


@cache
def _activate(device: torch.device) -> None:
    name = best(device)
    if name is None:
        raise UserError(
            "kernel 'flash_attn': no flash-attn 3 or 4 for this device",
            given=f"{device}, installed: {', '.join(installed()) or 'none'}",
            allowed="FA3 on capability 9, FA4 on 10",
            remedy="Install one of them, or choose the kernel 'auto'.",
        )
    if current_flash_attention_impl() != name:
        activate_flash_attention_impl(name)


def _has_fa4() -> bool:
    # Asking for the spec of flash_attn.cute would import flash_attn. Wheels of flash-attn 2 may carry that folder, too,
    # but not what it is written in, cutlass.
    package = importlib.util.find_spec("flash_attn")
    folders = (package.submodule_search_locations or ()) if package is not None else ()
    if not any((Path(folder) / "cute" / "interface.py").is_file() for folder in folders):
        return False
    return importlib.util.find_spec("cutlass") is not None


KERNEL = backend("flash_attn", "flash-attn 3 or 4 where one is installed", attend, backward, device="cuda")
