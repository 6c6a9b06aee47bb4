"""Exact attention over several ranks: layouts, schedules, transports, kernels, byte ledger, planner."""

from burst.attend import attention
from burst.errors import HostFailure, UserError
from burst.layouts import Layout, layout
from burst.transport import Transport, VirtualWorld, run_virtual

__all__ = [
    "HostFailure",
    "Layout",
    "Transport",
    "UserError",
    "VirtualWorld",
    "attention",
    "layout",
    "run_virtual",
]
