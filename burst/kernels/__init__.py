"""Block kernels: attention of a block of queries over a block of keys, with the log-sum-exp to merge by."""

from __future__ import annotations

import importlib

import torch

from burst.kernels.base import KERNELS, Kernel
from burst.kernels.soft_cap import capped

__all__ = ["KERNELS", "Kernel", "capped", "kernel"]


def kernel(name: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Kernel:
    """Return the kernel of that name; ``auto`` takes the fastest one for inputs of ``dtype`` on ``device``.

    Modules load when they are asked for. Raises UserError for an unknown name.
    """
    if name == "auto":
        name = torch.device(device).type
        if name not in ("cpu", "cuda") or (name == "cuda" and dtype == torch.float64):
            name = "reference"
        elif name == "cuda" and dtype in (torch.bfloat16, torch.float16):
            flash_attn = importlib.import_module("burst.kernels.flash_attn")
            name = "cuda" if flash_attn.best(torch.device(device)) is None else "flash_attn"
    return KERNELS.get(name)
