"""Prefill strategies: frozen sets of options that make plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from apb.compress.base import Compressor
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from burst.registry import Registry


@dataclass(frozen=True)
class Strategy(ABC):
    """A way to spread a context over hosts, and the keys that each block attends to; its fields are its options."""

    name: ClassVar[str]
    takes_compressor: ClassVar[bool] = False
    complexity: ClassVar[int] = 100  # ``auto`` takes the lower one of strategies that cost the same
    default_hosts: ClassVar[int | None] = None  # hosts when none are asked for; None: the cluster's default

    @abstractmethod
    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the plan as data; raises UserError for lengths or host counts the strategy cannot take."""


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "apb.strategies", "strategy")
