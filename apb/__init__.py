"""Distributed long-context prefill: ``Engine`` is the way in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apb.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; whoever asks only for a plan or a compressor should not wait for it.
    if name == "Engine":
        from apb.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'apb' has no attribute '{name}'")
