"""Exact attention by rings inside machines and a ring between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.strategies.base import STRATEGIES
from apb.strategies.exact import Exact


@STRATEGIES.register("burst", "exact: rings inside machines, and a ring between them")
@dataclass(frozen=True)
class Burst(Exact):
    """A block leaves for the next machine a whole round early. Source: BurstAttention, arXiv 2403.09347."""

    complexity: ClassVar[int] = 2
