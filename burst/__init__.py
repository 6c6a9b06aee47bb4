"""Exact attention over several ranks: layouts, schedules, transports, kernels, byte ledger, planner."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burst.errors import HostFailure, UserError
    from burst.execution.attend import attention
    from burst.layouts.layout import Layout, layout
    from burst.transport import Transport, VirtualWorld, run_virtual

__all__ = ["HostFailure", "Layout", "Transport", "UserError", "VirtualWorld", "attention", "layout", "run_virtual"]

# Imported when they are used: errors and registries need no torch, whose import takes more than a second.
_ROOMS = {
    "HostFailure": "burst.errors",
    "Layout": "burst.layouts.layout",
    "Transport": "burst.transport",
    "UserError": "burst.errors",
    "VirtualWorld": "burst.transport",
    "attention": "burst.execution.attend",
    "layout": "burst.layouts.layout",
    "run_virtual": "burst.transport",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'burst' has no attribute '{name}'")
    return getattr(importlib.import_module(_ROOMS[name]), name)
