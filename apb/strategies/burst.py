"""Exact attention by rings inside machines and a ring between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.strategies.exact import Exact


@dataclass(frozen=True)
class Burst(Exact):
    """A block leaves for the next machine a whole round early. Source: BurstAttention, arXiv 2403.09347."""

    name: ClassVar[str] = "burst"
