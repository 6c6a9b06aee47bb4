"""Retaining heads: what they compute, their files, and those that are shipped."""

from __future__ import annotations

from apb.compress.heads.base import Head, RetainingHeads, head_input
from apb.compress.heads.files import find, load, on_device, save, shipped

__all__ = ["Head", "RetainingHeads", "find", "head_input", "load", "on_device", "save", "shipped"]
