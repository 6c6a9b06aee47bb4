"""Decoders by name: one file each, or another package's, imported when asked for."""

from __future__ import annotations

from typing import Any

from apb.decode.base import DECODERS, Decoder


def decoder(name: str, **options: Any) -> Decoder:
    """Return the decoder ``name`` with its options; raises UserError for unknown names and options."""
    made: Decoder = DECODERS.make(name, options)
    return made


__all__ = ["DECODERS", "Decoder", "decoder"]
