"""Prefill strategies by name; each is one file, imported when asked for."""

from __future__ import annotations

from typing import Any

from apb.strategies.base import Strategy
from burst.registry import build

STRATEGIES = {
    "full": "apb.strategies.full:Full",
    "star": "apb.strategies.star:Star",
    "apb": "apb.strategies.apb:APB",
    "spava": "apb.strategies.spava:Spava",
    "ring": "apb.strategies.ring:Ring",
    "burst": "apb.strategies.burst:Burst",
    "allgather": "apb.strategies.allgather:AllGather",
    "ulysses": "apb.strategies.ulysses:Ulysses",
    "usp": "apb.strategies.usp:USP",
    "auto": "apb.strategies.auto:Auto",
}


def strategy(name: str, **options: Any) -> Strategy:
    """Return the strategy ``name`` with its options; raises UserError naming what is allowed."""
    made = build("strategy", "strategy", STRATEGIES, name, options)
    assert isinstance(made, Strategy)
    return made


__all__ = ["STRATEGIES", "Strategy", "strategy"]
