"""Memory of this process and free memory, as the operating system reports them."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free for tensors: the GPU's, or this machine's, or its container's if that is less."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text()) - _cached_bytes()
    except (OSError, ValueError):  # no such control group, or "max"
        return free
    return min(free, max(0, limit - used))


def _cached_bytes() -> int:
    """Return the container's copies of files that the system gives up first when memory is short."""
    lines = (_CGROUP / "memory.stat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def reset_peak_rss() -> bool:
    """Start the peak anew; False where the system cannot (then the peak is the process's lifetime's)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int:
    """Return the peak resident size of this process, in bytes, since the last reset."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def rss_bytes() -> int:
    """Return the resident size of this process now, in bytes; 0 where it is not known."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
