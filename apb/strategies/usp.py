"""Exact attention by heads among groups of hosts, and a ring between the groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.plan import ModelShape
from apb.spread import Spread
from apb.strategies.exact import Exact


@dataclass(frozen=True)
class USP(Exact):
    """``ulysses`` neighbours share their positions by heads. Source: arXiv 2405.07719."""

    name: ClassVar[str] = "usp"
    ulysses: int | None = None  # a divisor of the hosts; None: the largest that the kv heads can fill

    def spread(self, context: int, hosts: int, shape: ModelShape) -> Spread:
        """Return which layout and schedule attend; raises UserError where groups do not divide the hosts."""
        fitting = [n for n in range(1, hosts + 1) if hosts % n == 0 and n <= shape.kv_heads]
        return Spread(self.name, self.layout, context, hosts, fitting[-1] if self.ulysses is None else self.ulysses)
