"""Exact attention by heads among groups of hosts, and a ring between the groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from apb.plan.exact import Spread
from apb.plan.shapes import ModelShape
from apb.strategies.base import STRATEGIES
from apb.strategies.exact import Exact
from burst.registry import option


@STRATEGIES.register("usp", "exact: heads are shared among neighbours, and a ring joins the groups")
@dataclass(frozen=True)
class USP(Exact):
    """``ulysses`` neighbours share their positions by heads. Source: arXiv 2405.07719."""

    complexity: ClassVar[int] = 4
    ulysses: int | None = option(
        None, "neighbours that share heads, a divisor of the hosts; null: the most that divide the kv heads too"
    )

    def spread(self, context: int, hosts: int, shape: ModelShape) -> Spread:
        """Return which layout and schedule attend; raises UserError where groups do not divide the hosts."""
        # Otherwise some neighbours get more kv heads than others.
        even = math.gcd(hosts, *(kind.attention_shape(shape.element_size).kv_heads for kind in shape.sharded))
        return Spread(self.name, self.layout, context, hosts, even if self.ulysses is None else self.ulysses)
