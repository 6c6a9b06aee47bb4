"""Costs of strategies over lengths and host counts, and where one overtakes another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from apb.costs import Network, Rates, cost
from apb.engine.setup import Setup
from apb.plan.flops import prefill_flops, query_flops
from bench.tools.prompts import lengths, setups
from burst.errors import UserError

EXACT = ("full", "ring", "burst", "allgather", "ulysses", "usp")
SAME = 1.01  # times closer than this are one: no crossing is told between them


def row(setup: Setup, tokens: int, query: int, rates: Rates, network: Network, memory: float | None) -> dict[str, Any]:
    """Return one strategy's cost at one length; ``refused`` says why there is none."""
    about = {"strategy": setup.strategy.name, "hosts": setup.hosts, "tokens": tokens, "simulated": True}
    try:
        plan = setup.strategy.plan(lengths(tokens, query), setup.hosts, setup.shape, setup.compressor)
    except UserError as error:
        return {**about, "refused": error.message}
    found = cost(plan, rates, network)
    flops = max(prefill_flops(plan, r) + query_flops(plan, r) for r in range(plan.hosts))
    fits = memory is None or found.memory <= memory
    return {**about, "exact": plan.exact, "flops_most": flops, "fits": fits, **found.to_dict()}


def rows(
    base: Setup,
    names: Sequence[str],
    hosts: Sequence[int],
    tokens: Sequence[int],
    query: int,
    rates: Rates,
    network: Network,
    memory: float | None,
) -> list[dict[str, Any]]:
    """Return a row for every strategy, host count and length; full attention once a length."""
    found = []
    for length in tokens:
        full: dict[str, Any] | None = None
        for count in hosts:
            for setup in setups(base, names, count, base.compressor):
                if setup.strategy.name == "full" and full is not None:
                    continue
                found.append(row(setup, length, query, rates, network, memory))
                if setup.strategy.name == "full":
                    full = found[-1]
    for each in found:
        alone = next((r for r in found if r["strategy"] == "full" and r["tokens"] == each["tokens"]), None)
        if alone is not None and "seconds" in alone and "seconds" in each:
            each["over_full"] = alone["worst_s"] / each["worst_s"]
    return found


def crossings(xs: Sequence[int], series: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return where the lowest of some curves over ``xs`` changes: ``below`` x one, from there on another.

    Curves are straight between their points on logarithmic scales; a curve may be infinite where it does not exist.
    """
    winners = [min(series, key=lambda name: series[name][i]) for i in range(len(xs))]
    found = []
    for i, (a, b) in enumerate(pairwise(winners)):
        if a == b or series[a][i + 1] <= SAME * series[b][i + 1]:
            continue
        at = _meet(xs[i], xs[i + 1], (series[a][i], series[a][i + 1]), (series[b][i], series[b][i + 1]))
        found.append({"at": round(at), "below": a, "above": b})
    return found


def _meet(left: int, right: int, a: tuple[float, float], b: tuple[float, float]) -> float:
    """The x at which a line from ``a[0]`` to ``a[1]`` meets that of b, all on logarithmic scales."""
    if not all(math.isfinite(y) for y in (*a, *b)):
        return right
    start, end = math.log(a[0] / b[0]), math.log(a[1] / b[1])
    share = 0.0 if start == end else start / (start - end)
    return float(left * (right / left) ** min(1.0, max(0.0, share)))


def series(found: Sequence[Mapping[str, Any]], over: str, xs: Sequence[int]) -> dict[str, list[float]]:
    """Return seconds by strategy over ``xs`` of ``over`` (tokens or hosts); infinite where it does not run or fit."""
    out: dict[str, list[float]] = {}
    for name in dict.fromkeys(each["strategy"] for each in found):
        mine = {e[over]: e["worst_s"] for e in found if e["strategy"] == name and "worst_s" in e and e["fits"]}
        if name == "full" and over == "hosts":
            mine = dict.fromkeys(xs, next(iter(mine.values()), math.inf))
        out[name] = [mine.get(x, math.inf) for x in xs]
    return out


def replicas(found: Sequence[Mapping[str, Any]], tokens: Sequence[int], hosts: int) -> list[dict[str, Any]]:
    """Return below which length ``hosts`` replicas of full attention serve more requests than one group of them.

    A replica answers every ``full`` seconds, so ``hosts`` of them one in ``full / hosts``.
    """
    here = [each for each in found if each["hosts"] == hosts or each["strategy"] == "full"]
    by_name = series(here, "tokens", tokens)
    if "full" not in by_name:
        return []
    each_s = [seconds / hosts for seconds in by_name.pop("full")]
    out = []
    for name, seconds in by_name.items():
        crossing = crossings(tokens, {"replicas": each_s, name: seconds})
        wins = "replicas" if each_s[0] <= seconds[0] else name
        at = crossing[0]["at"] if crossing else None
        out.append({"strategy": name, "hosts": hosts, "at": at, "below": wins})
    return out
