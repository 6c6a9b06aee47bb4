"""What the emulator predicts beside what real processes take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from apb.costs.network import Network
from apb.engine import Engine
from apb.host import load_adapter
from apb.models.adapter import Adapter
from apb.prompt import Prompt
from apb.setup import Setup
from bench.emulate.measure import record
from bench.emulate.real import PinnedCluster
from bench.timing import ratio, spread
from burst.timeline import interval
from launch.display import Display, seconds


class Seconds(NamedTuple):
    """To the first token's logits, and the busiest host's own work of them."""

    wall: float
    work: float


def measured_network(cluster: PinnedCluster) -> Network:
    """Return this machine's links between two processes."""
    bandwidth, latency = cluster.call("link", [()] * cluster.hosts)[0]
    return Network("gloo on one machine", 1, bandwidth / 1e9, latency * 1e6, bandwidth / 1e9, latency * 1e6)


def pairs(
    setups: Sequence[Setup], prompt: Prompt, short: Prompt, hosts: int, repeats: int, display: Display
) -> tuple[Network, list[dict[str, Any]]]:
    """Predict and measure each setup in turn, ``repeats`` times; returns the links and a row a strategy.

    The prediction is the makespan as ordered, of hosts that ran one after another on one core.
    """
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
    return network, [_row(name, measured) for name, measured in found.items()]


def _row(name: str, measured: Sequence[tuple[Seconds, Seconds]]) -> dict[str, Any]:
    predicted, real = zip(*measured, strict=True)
    wall = ratio([each.wall for each in predicted], [each.wall for each in real])
    return {
        "strategy": name,
        "predicted_s": spread([each.wall for each in predicted]),
        "real_s": spread([each.wall for each in real]),
        "predicted_over_real": wall,
        "within": abs(wall["median"] - 1),
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
        ]
        for row in rows
    ]
    title = "Predicted (emulated, as ordered) and real seconds to the first token's logits, pair by pair"
    display.table(title, ["", "predicted", "real", "ratio", "interquartile", "own work"], lines)
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
