"""Exact attention over several ranks: layouts, schedules, transports, kernels, byte ledger, planner."""

from burst.errors import HostFailure, UserError
from burst.execution.attend import attention
from burst.layouts.layout import Layout, layout
from burst.transport import Transport, VirtualWorld, run_virtual

__all__ = ["HostFailure", "Layout", "Transport", "UserError", "VirtualWorld", "attention", "layout", "run_virtual"]
