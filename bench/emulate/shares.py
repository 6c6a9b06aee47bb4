"""Emulated hosts beside the device's own rates and beside what arithmetic allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apb.costs.network import Network
from apb.engine.setup import Setup
from apb.host.load import load_adapter
from apb.plan.flops import part_flops
from apb.prompt.prompt import Prompt
from bench.emulate.measure import Measured, run
from bench.kernels.measure import Device
from bench.tools.timing import ratio, spread


def emulate(
    setups: Sequence[Setup],
    prompt: Prompt,
    short: Prompt,
    network: Network,
    repeats: int,
    device: Device,
    tell: Callable[[str], None],
) -> tuple[list[Measured], dict[str, Any]]:
    """Measure the setups on emulated hosts; return what was measured, and the document's part that says it."""
    tell("Loading the model")
    baseline = Baseline(device, prompt.lengths.context)
    found = run(setups, prompt, short, load_adapter(setups[0].spec), network, repeats, baseline.round, tell)
    ratios = {f"{a.name} over {b.name}": ratio(b.worst_s, a.worst_s) for a in found for b in found if a is not b}
    rows = [each.row() for each in found]
    return found, {
        "emulated": True,
        "rows": rows,
        "ratios": ratios,
        "baseline": baseline.document(found),
        "limits": limits(found),
    }


class Baseline:
    """The device's own rates at the baseline's shapes, measured once a round."""

    def __init__(self, device: Device, tokens: int) -> None:
        self.device, self._tokens = device, tokens
        self._linear: list[float] = []
        self._causal: list[float] = []

    def round(self, number: int) -> None:
        """Measure; a round below 0 does not count."""
        linear = self.device.linear_rate(self._tokens)
        causal = self.device.attention_rate(self._tokens, self._tokens, causal=True)
        if number >= 0:
            self._linear.append(linear)
            self._causal.append(causal)

    def document(self, found: Sequence[Measured]) -> dict[str, Any]:
        """Return the rates, and each strategy's shares of them: linear layers, and attention calls."""
        linear, causal = spread(self._linear), spread(self._causal)
        shares = {}
        for each in found:
            rates = each.row()["rates"]
            shares[each.name] = {
                "linear": rates["linear"] / linear["median"],
                "attention": rates.get("attention", 0.0) / causal["median"],
            }
        told = (
            f"Device: {linear['median'] / 1e12:.3g} TFLOP/s in this model's projections at {self._tokens:,} tokens, "
            f"{self.device.matrix_rate / 1e12:.3g} in a large square product, {causal['median'] / 1e12:.3g} in one "
            "causal attention call of the whole context. "
        )
        if "full" in shares:
            own = shares["full"]
            told += f"Baseline full: {own['linear']:.0%} of the first and {own['attention']:.0%} of the last."
        return {
            "projections_flops_per_s": linear,
            "causal_flops_per_s": causal,
            "matrix_flops_per_s": self.device.matrix_rate,
            "copy_bytes_per_s": self.device.copy_rate,
            "shares": shares,
            "told": told,
        }


def limits(found: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Return how many times faster than full attention each strategy can be by FLOPs alone.

    ``equal_rates``: one rate for everything; ``measured_rates``: full attention's own rates.
    """
    full = next((each for each in found if each.name == "full"), None)
    if full is None:
        return {}
    rates = full.row()["rates"]

    def busiest(each: Measured, rate: Mapping[str, float]) -> float:
        parts = (part_flops(each.plan, rank) for rank in range(each.plan.hosts))
        return max(sum(flops / rate[name] for name, flops in part.items()) for part in parts)

    by = {"equal_rates": dict.fromkeys(rates, 1.0), "measured_rates": rates}
    return {each.name: {name: busiest(full, r) / busiest(each, r) for name, r in by.items()} for each in found}
