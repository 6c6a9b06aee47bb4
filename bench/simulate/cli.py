"""``apb bench simulate``: settings made into a grid, tables, crossovers and rows."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apb.costs import Network, assumed, load
from apb.engine.setup import Setup
from bench.emulate.measure import PARTS
from bench.settings import SimulateSettings
from bench.simulate.grid import EXACT, crossings, replicas, rows, series
from bench.tools.conditions import provenance
from bench.tools.rows import keep
from bench.tools.setup import base_setup
from burst.errors import in_range
from launch.config.build import chosen_compressor
from launch.config.typed import typed
from launch.terminal.display import Display, seconds, size

MOST_HOSTS = 2_048  # tables of who sends to whom have a cell for each pair
FINE = 64  # hosts up to which lengths and host counts between the asked ones are costed to find crossovers


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Cost, show and return the document. Raises UserError for settings that mean nothing."""
    asked = typed(SimulateSettings, config["bench"], "bench.")
    for key in ("hosts", "tokens"):
        values = getattr(asked, key)
        in_range(f"bench.{key}", list(values), bool(values) and min(values) >= 1, "a list of numbers, 1 or more")
    in_range("bench.hosts", list(asked.hosts), max(asked.hosts) <= MOST_HOSTS, f"up to {MOST_HOSTS:,} hosts")
    network = typed(Network, config["network"], "network.")
    rates = load(Path(asked.rates)) if asked.rates else assumed(asked.machine)
    base = dataclasses.replace(base_setup(config, display), compressor=chosen_compressor(config))
    memory = None if asked.memory_gb is None else asked.memory_gb * 1e9
    start = time.perf_counter()

    def costed(hosts: Sequence[int], tokens: Sequence[int]) -> list[dict[str, Any]]:
        return rows(base, asked.strategies, hosts, tokens, asked.query_tokens, rates, network, memory)

    found = costed(asked.hosts, asked.tokens)
    told = _crossovers(asked, costed)
    spent = time.perf_counter() - start
    display.note(
        f"SIMULATED: {config['model']['name']}, {base.spec.dtype}, rates {rates.name}, network {network.name}; "
        f"{len(found)} cases and their crossovers in {seconds(spent)}.",
        style="bold",
    )
    _show(found, display)
    for line in told["lines"]:
        display.note(line)
    document = {
        "bench": "simulate",
        "rows": found,
        "crossovers": told["crossovers"],
        "rates": dataclasses.asdict(rates),
        "network": dataclasses.asdict(network),
        "seconds": spent,
        **provenance(config, f"none: rates {rates.name}"),
    }
    if asked.save:
        _keep(document, base)
    return document


def _between(values: Sequence[int]) -> list[int]:
    """The asked values, and those a factor of two apart between the least and the greatest."""
    doubled = itertools.takewhile(lambda x: x < max(values), (min(values) << k for k in range(64)))
    return sorted({*values, *doubled})


def _crossovers(asked: SimulateSettings, costed: Any) -> dict[str, Any]:
    """Find where strategies overtake each other over lengths and over hosts, exact ones and all of them."""
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    groups = {"exact": [n for n in asked.strategies if n in EXACT], "all": list(asked.strategies)}
    fine = [count for count in asked.hosts if count <= FINE]
    lengths = _between(asked.tokens)
    if len(lengths) > 1:
        for count in fine:
            here = costed([count], lengths)
            curves = series(here, "tokens", lengths)
            for kind, names in groups.items():
                for each in crossings(lengths, {n: curves[n] for n in names}):
                    found.append({"over": "tokens", "hosts": count, "among": kind, **each})
                    then = f"from there on {each['above']}"
                    lines.append(
                        f"{count} hosts, {_among(kind)}: below {each['at']:,} tokens use {each['below']}, {then}."
                    )
            groups_of = replicas(here, lengths, count)
            found += [{"over": "replicas", **each} for each in groups_of]
            lines += _replica_lines(groups_of, count, lengths)
    counts = [count for count in _between(asked.hosts) if count <= FINE]
    if len(counts) > 1:
        for length in asked.tokens:
            curves = series(costed(counts, [length]), "hosts", counts)
            for kind, names in groups.items():
                for each in crossings(counts, {n: curves[n] for n in names}):
                    found.append({"over": "hosts", "tokens": length, "among": kind, **each})
                    then = f"below {each['below']}"
                    lines.append(
                        f"{length:,} tokens, {_among(kind)}: above {each['at']} hosts use {each['above']}, {then}."
                    )
    return {"crossovers": found, "lines": lines}


def _among(kind: str) -> str:
    return "exact ones" if kind == "exact" else "all strategies"


def _replica_lines(found: Sequence[Mapping[str, Any]], hosts: int, lengths: Sequence[int]) -> list[str]:
    """Say when replicas of full attention serve more requests; strategies that never change sides in one line."""
    span = f"{lengths[0]:,} to {lengths[-1]:,} tokens"
    lines, always = [], {"more": list[str](), "fewer": list[str]()}
    for each in found:
        name = each["strategy"]
        if each["at"] is None:
            always["more" if each["below"] == "replicas" else "fewer"].append(name)
        else:
            lines.append(f"{hosts} replicas serve more requests than one group of {name} below {each['at']:,} tokens.")
    for told, names in always.items():
        if names:
            lines.append(f"{hosts} replicas serve {told} requests than one group of {', '.join(names)}, {span}.")
    return lines


def _show(found: Sequence[Mapping[str, Any]], display: Display) -> None:
    for tokens, hosts in dict.fromkeys((e["tokens"], e["hosts"]) for e in found if e["strategy"] != "full"):
        here = [e for e in found if e["tokens"] == tokens and (e["hosts"] == hosts or e["strategy"] == "full")]
        table = []
        for each in here:
            if "refused" in each:
                table.append([each["strategy"], "cannot run", *[""] * (5 + len(PARTS))])
                continue
            parts = [f"{each['parts'].get(name, 0.0):.3g}" for name in PARTS]
            over = f"{each['over_full']:.2f}x" if "over_full" in each else ""
            memory = size(each["memory"]) + ("" if each["fits"] else " !")
            sent = size(each["sent_most"])
            times = [seconds(each["worst_s"]), seconds(each["seconds"]), over]
            table.append([each["strategy"], *times, *parts, seconds(each["exposed_s"]), sent, memory])
        columns = ["", "no overlap", "ordered", "over full", *PARTS, "exposed", "sends", "memory"]
        display.table(f"{tokens:,} tokens, {hosts} hosts, simulated", columns, table)
    display.note(
        "Seconds to the first token's logits; over full compares the ends without overlap. sends, memory: the most of "
        "any host. !: does not fit.",
        style="dim",
    )


def _keep(document: Mapping[str, Any], base: Setup) -> None:
    """Add the rows to the dated file that ``apb bench report`` reads."""
    kept = []
    shared = {k: v for k, v in document.items() if k not in ("rows", "crossovers", "seconds")}
    shared["rates"] = document["rates"]["name"]
    for each in document["rows"]:
        name = document["configuration"]["model"]["name"]
        key = "/".join(str(x) for x in (name, base.spec.dtype, each["strategy"], each["hosts"], each["tokens"]))
        kept.append((f"{key}/{document['rates']['name']}/{document['network']['name']}", {**shared, **each}))
    keep("simulate", kept)
