"""Compressors by name: one file each, or another package's, imported when asked for."""

from __future__ import annotations

from typing import Any

from apb.compress.base import COMPRESSORS, Candidates, Compressor, top_rows


def compressor(name: str, **options: Any) -> Compressor:
    """Return the compressor ``name`` with its options; raises UserError for unknown names and options."""
    made: Compressor = COMPRESSORS.make(name, options)
    return made


__all__ = ["COMPRESSORS", "Candidates", "Compressor", "compressor", "top_rows"]
