"""burst: exact attention pieces over several ranks, on torch alone: kernels, merge, transports, ledger."""

from burst.errors import HostFailure, UserError
from burst.transport import Transport, VirtualWorld, run_virtual

__all__ = ["HostFailure", "Transport", "UserError", "VirtualWorld", "run_virtual"]
