"""Exact attention by keys and values that go round a ring of all hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.strategies.base import STRATEGIES
from apb.strategies.exact import Exact


@STRATEGIES.register("ring", "exact: keys and values go round a ring of all hosts")
@dataclass(frozen=True)
class Ring(Exact):
    """Each hop is posted before the kernel that hides it. Source: Ring Attention, arXiv 2310.01889."""

    complexity: ClassVar[int] = 1
