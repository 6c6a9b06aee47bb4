"""The strategy that would be fastest, by what its plan costs; that very plan then runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from apb.compress.base import Compressor
from apb.costs import Cost, Network, Rates, assumed, cost, load
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.strategies.base import STRATEGIES, Strategy
from burst.errors import UserError
from burst.registry import option, same

TIE = 1.01  # costs closer than this are one: the simpler strategy is taken


@STRATEGIES.register(
    "auto",
    "the one that costs least on these hosts, as 'apb bench simulate' reckons; the plan says which",
)
@dataclass(frozen=True)
class Auto(Strategy):
    """Plans every strategy that can run on these hosts and returns the plan that costs least without overlap."""

    takes_compressor: ClassVar[bool] = True

    exact: bool = option(False, "true: exact strategies only")
    rates: str | None = option(None, "a file of 'apb bench kernels'; null: assumed for the machine", text=True)
    machine: str = option("cuda", "speeds to assume without rates: cpu or cuda")
    hosts_per_node: int = same(Network, "hosts_per_node")
    intra_gb_per_s: float = same(Network, "intra_gb_per_s")
    intra_us: float = same(Network, "intra_us")
    inter_gb_per_s: float = same(Network, "inter_gb_per_s")
    inter_us: float = same(Network, "inter_us")

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        """Return the cheapest plan, which says its own strategy; raises UserError where none can run."""
        found = self.costs(lengths, hosts, shape, compressor)
        least = min(each.worst_s for _, each in found)
        close = [plan for plan, each in found if each.worst_s <= least * TIE]
        return min(close, key=lambda plan: STRATEGIES.get(plan.strategy).complexity)

    def costs(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> list[tuple[PrefillPlan, Cost]]:
        """Return every plan that can run on these hosts with its cost; raises UserError where none can."""
        rates: Rates = assumed(self.machine) if self.rates is None else load(Path(self.rates))
        found, rejection = [], None
        network = Network("given", *(getattr(self, field.name) for field in fields(Network)[1:]))
        for name in STRATEGIES:
            if name == self.name:
                continue
            each: Strategy = STRATEGIES.make(name, {})
            asks = compressor is not None and compressor.needs_question and lengths.question == 0
            if each.takes_compressor and asks:
                continue  # rejected where such a compressor is chosen for itself
            try:
                plan = each.plan(lengths, hosts, shape, compressor if each.takes_compressor else None)
            except UserError as error:
                rejection = error
                continue
            if plan.exact or not self.exact:
                found.append((plan, cost(plan, rates, network)))
        if not found:
            assert rejection is not None
            raise rejection
        return found
