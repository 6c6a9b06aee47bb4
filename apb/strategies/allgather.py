"""Exact attention by all hosts' keys and values, sent straight to every host that needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb.strategies.base import STRATEGIES
from apb.strategies.exact import Exact


@STRATEGIES.register("allgather", "exact: keys and values of all hosts are sent straight to every host")
@dataclass(frozen=True)
class AllGather(Exact):
    """Fewest steps, most buffers. Source: Llama 3's context parallelism, arXiv 2407.21783."""

    complexity: ClassVar[int] = 3
