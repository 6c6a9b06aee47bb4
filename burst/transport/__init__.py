"""Transports: messages between ranks."""

from burst.transport.base import Gathered, Handle, Message, Transport
from burst.transport.virtual import VirtualWorld, run_virtual

__all__ = ["Gathered", "Handle", "Message", "Transport", "VirtualWorld", "run_virtual"]
