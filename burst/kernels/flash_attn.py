"""flash-attn 3 or 4 where one is installed: torch puts their kernels behind the flash operators that ``cuda`` calls.

flash-attn 2 would add nothing, torch's own operators are built from it. Chosen for the whole process, as torch does it.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

from burst.errors import UserError
from burst.kernels import cuda
from burst.kernels.base import Checked, Kernel

# By the device's major capability, best first: FA3 is written for Hopper, FA4 for Blackwell.
CHOICES = {9: ("FA3", "FA4"), 10: ("FA4",)}
PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}


def installed() -> tuple[str, ...]:
    """Return which of the implementations can be imported; nothing is."""
    return tuple(name for name, module in PACKAGES.items() if _has(module))


def best(device: torch.device) -> str | None:
    """Return the implementation for a CUDA device; None: torch's own."""
    found = installed()
    major = torch.cuda.get_device_capability(device)[0] if found else 0
    return next((name for name in CHOICES.get(major, ()) if name in found), None)


def attend(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As ``cuda.attend``, by flash-attn's kernels; raises UserError where there are none for the device."""
    _activate(q_BHSD.device)
    return cuda.attend(q_BHSD, k_BKTD, v_BKTE, causal, scale)


def backward(
    q_BHSD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    out_BHSE: Tensor | None,
    lse_BHS: Tensor,
    dout_BHSE: Tensor,
    delta_BHS: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``cuda.backward``, by flash-attn's kernels."""
    _activate(q_BHSD.device)
    return cuda.backward(q_BHSD, k_BKTD, v_BKTE, out_BHSE, lse_BHS, dout_BHSE, delta_BHS, causal, scale)


@cache
def _activate(device: torch.device) -> None:
    name = best(device)
    if name is None:
        raise UserError(
            "kernel 'flash_attn': no flash-attn 3 or 4 for this device",
            given=f"{device}, installed: {', '.join(installed()) or 'none'}",
            allowed="FA3 on capability 9, FA4 on 9 and 10",
            remedy="Install one of them, or choose the kernel 'auto'.",
        )
    if current_flash_attention_impl() != name:
        activate_flash_attention_impl(name)


def _has(module: str) -> bool:
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


KERNEL: Kernel = Checked("flash_attn", attend, backward, device="cuda")
