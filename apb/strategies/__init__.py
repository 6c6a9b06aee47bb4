"""Prefill strategies by name: one file each, or another package's, imported when asked for."""

from __future__ import annotations

from typing import Any

from apb.strategies.base import STRATEGIES, Strategy


def strategy(name: str, **options: Any) -> Strategy:
    """Return the strategy ``name`` with its options; raises UserError for unknown names and options."""
    made: Strategy = STRATEGIES.make(name, options)
    return made


__all__ = ["STRATEGIES", "Strategy", "strategy"]
