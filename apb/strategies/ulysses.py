"""Exact attention by heads: every host gets all positions of its share of the heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.strategies.base import STRATEGIES
from apb.strategies.exact import Exact, LayoutName
from burst.registry import option


@STRATEGIES.register("ulysses", "exact: every host gets all positions of its share of the heads")
@dataclass(frozen=True)
class Ulysses(Exact):
    """Hosts beyond the query heads only carry positions. Source: DeepSpeed-Ulysses, arXiv 2309.14509."""

    complexity: ClassVar[int] = 5
    layout: LayoutName = option("contiguous", "contiguous or zigzag; the work is even by heads")
