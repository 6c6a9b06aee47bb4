"""Predictions of the emulator, and of the simulator where rates are given, beside real processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from apb.costs import Network, Rates, cost
from apb.engine.engine import Engine
from apb.engine.setup import Setup
from apb.host.load import load_adapter
from apb.models.adapter import Adapter
from apb.prompt.prompt import Prompt
from bench.emulate.measure import record
from bench.emulate.real import PinnedCluster
from bench.tools.timing import ratio, spread
from burst.planner.timeline import interval
from launch.terminal.display import Display, seconds

SIMULATED = ("simulated_over_real", "work_simulated_over_real")


class Seconds(NamedTuple):
    """To the first token's logits, and the busiest host's own work of them."""

    wall: float
    work: float


def measured_network(cluster: PinnedCluster) -> Network:
    """Return this machine's links between two processes."""
    bandwidth, latency = cluster.call("link", [()] * cluster.hosts)[0]
    return Network("gloo on one machine", 1, bandwidth / 1e9, latency * 1e6, bandwidth / 1e9, latency * 1e6)


def pairs(
    setups: Sequence[Setup], prompt: Prompt, short: Prompt, repeats: int, rates: Rates | None, display: Display
) -> tuple[Network, list[dict[str, Any]]]:
    """Predict and measure each setup in turn, ``repeats`` times and return the links and a row a strategy.

    The prediction is the makespan as ordered, of hosts that ran one after another on one core; with ``rates``, the
    simulator's stands beside it.
    """
    hosts = setups[0].hosts
    spec = replace(setups[0].spec, device="cpu")
    with display.waiting(f"Starting {hosts} gloo processes, each on a core"):
        cluster = PinnedCluster(spec, hosts)
    try:
        adapter = load_adapter(spec)
        network = measured_network(cluster)
        found: dict[str, list[tuple[Seconds, Seconds]]] = {s.strategy.name: [] for s in setups}
        for number in range(-1, repeats):
            for setup in setups:
                name = setup.strategy.name
                display.note(f"Pair {number + 1} of {repeats}: {name}" if number >= 0 else f"Warm-up: {name}", "dim")
                asked = prompt if number >= 0 else short
                pair = _predicted(setup, asked, adapter, network), _real(setup, asked, cluster)
                if number >= 0:
                    found[name].append(pair)
    finally:
        cluster.close()
    rows = []
    for setup in setups:
        row = _row(found[setup.strategy.name])
        if rates is not None:
            plan = setup.strategy.plan(prompt.lengths, hosts, setup.shape, setup.compressor)
            simulated = cost(plan, rates, network)
            row["simulated_over_real"] = simulated.seconds / row["real_s"]["median"]
            row["work_simulated_over_real"] = sum(simulated.parts.values()) / row["real_work_s"]["median"]
        rows.append({"strategy": setup.strategy.name, **row})
    return network, rows


def _row(measured: Sequence[tuple[Seconds, Seconds]]) -> dict[str, Any]:
    predicted, real = zip(*measured, strict=True)
    wall = ratio([each.wall for each in predicted], [each.wall for each in real])
    return {
        "predicted_s": spread([each.wall for each in predicted]),
        "real_s": spread([each.wall for each in real]),
        "predicted_over_real": wall,
        "within": abs(wall["median"] - 1),
        "real_work_s": spread([each.work for each in real]),
        "work_predicted_over_real": ratio([each.work for each in predicted], [each.work for each in real]),
    }


def show(network: Network, rows: Sequence[Mapping[str, Any]], display: Display) -> None:
    """Write the table."""
    display.note(
        f"Links between two processes here: {network.inter_gb_per_s:.2f} GB/s, {network.inter_us:.0f} us", style="bold"
    )
    lines = [
        [
            row["strategy"],
            seconds(row["predicted_s"]["median"]),
            seconds(row["real_s"]["median"]),
            "{:.3f}".format(row["predicted_over_real"]["median"]),
            "{:.3f} to {:.3f}".format(*row["predicted_over_real"]["iqr"]),
            "{:.3f}".format(row["work_predicted_over_real"]["median"]),
            *(f"{row[key]:.3f}" for key in SIMULATED if key in row),
        ]
        for row in rows
    ]
    columns = ["", "predicted", "real", "ratio", "interquartile", "own work"]
    if rows and SIMULATED[0] in rows[0]:
        columns += ["simulated", "its own work"]
    title = "Predicted (emulated, as ordered) and real seconds to the first token's logits, pair by pair"
    display.table(title, columns, lines)
    display.note(
        "own work: the ratio for the busiest host's processor time alone, which other programs here change little.",
        style="dim",
    )


def _predicted(setup: Setup, prompt: Prompt, adapter: Adapter, network: Network) -> Seconds:
    programs, _ = record(setup, prompt, adapter, network)
    ordered = interval(programs, network.topology(setup.hosts)).ordered
    return Seconds(ordered.total_s, max(ordered.work_s))


def _real(setup: Setup, prompt: Prompt, cluster: PinnedCluster) -> Seconds:
    engine = Engine(setup, cluster)
    handle = engine.prefill(prompt)
    found = Seconds(handle.metrics["prefill_s"], max(handle.metrics["host_work_s"]))
    engine.release(handle)
    time.sleep(0.05)  # the processes' last messages are told before the next prediction begins
    return found
