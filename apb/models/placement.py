"""Number types and devices by the names that people give."""

from __future__ import annotations

import re
from typing import Any

import torch

from burst.errors import UserError, choose

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def torch_dtype(name: str) -> torch.dtype:
    """Return the type of that name; raises UserError for another."""
    return DTYPES[choose("dtype", name, DTYPES)]


def resolve_dtype(name: str, device: str, config: Any) -> str:
    """Settle ``auto``: the checkpoint's own type on a GPU, float32 on a CPU. Raises UserError for unknown names."""
    choose("dtype", name, ("auto", *DTYPES))
    if name != "auto":
        return name
    stored = getattr(config, "dtype", None)
    return "float32" if device == "cpu" or stored is None else str(stored).removeprefix("torch.")


def resolve_device(name: str) -> str:
    """Settle ``auto`` (cuda where there is one) and check that the device exists; raises UserError."""
    kind, colon, index = name.partition(":")
    choose("device", kind, ("auto", "cpu", "cuda"))
    if colon and (kind != "cuda" or not re.fullmatch("0|[1-9][0-9]*", index)):
        raise UserError(
            "no such device name",
            given=f"device={name}",
            allowed="auto, cpu, cuda, cuda:N (N counts the machine's GPUs from 0)",
            remedy=f"Set device={kind}." if kind != "cuda" else "Set device=cuda:0, or device=cuda.",
        )
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return name
    count = torch.cuda.device_count()
    if not count or (index and int(index) >= count):
        raise UserError(
            "no such GPU on this machine",
            given=f"device={name}",
            allowed="cpu" if not count else f"cpu, cuda, cuda:0 to cuda:{count - 1}",
            remedy="Set device=cpu, or run where the GPU is.",
        )
    return name
