"""Ways of decoding by name; each is one file, imported when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burst.registry import build

if TYPE_CHECKING:
    from apb.decode.base import Decoder

DECODERS = {
    "autoregressive": "apb.decode.autoregressive:Autoregressive",
    "lookup": "apb.decode.lookup:Lookup",
    "eagle2": "apb.decode.eagle2:Eagle2",
}


def decoder(name: str, **options: Any) -> Decoder:
    """Return the decoder ``name`` with its options; raises UserError naming what is allowed."""
    made: Decoder = build("decoder", "decode", DECODERS, name, options)
    return made


__all__ = ["DECODERS", "decoder"]
