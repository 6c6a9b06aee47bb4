"""Compressors by name; each is one file, imported when asked for."""

from __future__ import annotations

from typing import Any

from apb.compress.base import Candidates, Compressor, top_rows
from burst.registry import build

COMPRESSORS = {
    "query": "apb.compress.query:Query",
    "random": "apb.compress.random:Random",
    "recent": "apb.compress.recent:Recent",
    "norm": "apb.compress.norm:Norm",
    "expected": "apb.compress.expected:Expected",
    "snapkv": "apb.compress.snapkv:SnapKV",
    "retaining": "apb.compress.retaining:Retaining",
}


def compressor(name: str, **options: Any) -> Compressor:
    """Return the compressor ``name`` with its options; raises UserError naming what is allowed."""
    made = build("compressor", "compress", COMPRESSORS, name, options)
    assert isinstance(made, Compressor)
    return made


__all__ = ["COMPRESSORS", "Candidates", "Compressor", "compressor", "top_rows"]
