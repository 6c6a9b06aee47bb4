"""Exact attention by heads: every host gets all positions of its share of the heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.strategies.exact import Exact, Layout


@dataclass(frozen=True)
class Ulysses(Exact):
    """Hosts beyond the query heads only carry positions. Source: DeepSpeed-Ulysses, arXiv 2309.14509."""

    name: ClassVar[str] = "ulysses"
    layout: Layout = "contiguous"  # heads balance the work, whoever holds which positions
