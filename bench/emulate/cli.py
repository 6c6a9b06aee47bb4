"""``apb bench emulate``: settings made into setups, tables, rows and pictures."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apb.compress import compressor
from apb.costs import Network, load
from bench.emulate.gantt import draw
from bench.emulate.measure import PARTS, Measured
from bench.emulate.shares import emulate
from bench.emulate.validate import pairs, show
from bench.kernels.calls import as_rates, measured
from bench.kernels.measure import Device
from bench.settings import EmulateSettings
from bench.tools.conditions import hardware, provenance
from bench.tools.drawing import drawn
from bench.tools.prompts import lengths, random_prompt, setups
from bench.tools.rows import keep
from bench.tools.setup import base_setup
from burst.errors import in_range
from launch.config.build import chosen_compressor
from launch.config.typed import typed
from launch.terminal.display import Display, seconds, size


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Measure, show and return the document. Raises UserError for what cannot be measured."""
    asked = typed(EmulateSettings, config["bench"], "bench.")
    for key in ("hosts", "repeats", "threads", "warmup_tokens"):
        in_range(f"bench.{key}", getattr(asked, key), getattr(asked, key) >= 1, "1 or more")
    network = typed(Network, config["network"], "network.")
    base = base_setup(config, display, asked.threads)
    prompt, short = (
        random_prompt(lengths(tokens, asked.query_tokens), base.shape.vocab)
        for tokens in (asked.tokens, min(asked.warmup_tokens, asked.tokens))
    )
    in_range("bench.hosts", asked.hosts, not asked.validate or asked.hosts >= 2, "2 or more with bench.validate=true")
    names = [n for n in asked.strategies if n != "full"] if asked.validate else asked.strategies
    everyone = setups(base, names, asked.hosts, chosen_compressor(config))
    if asked.validate:
        rates = load(Path(asked.rates)) if asked.rates else None
        links, compared = pairs(everyone, prompt, short, asked.repeats, rates, display)
        show(links, compared, display)
        return {
            "bench": "emulate",
            "tokens": asked.tokens,
            "network": dataclasses.asdict(links),
            "validation": compared,
            **provenance(config, hardware(base)),
        }
    device = Device(base.shape, base.spec.dtype, base.spec.device)
    found, told = emulate(everyone, prompt, short, network, asked.repeats, device, lambda x: display.note(x, "dim"))
    document = {"bench": "emulate", "tokens": asked.tokens, **told, **provenance(config, hardware(base))}
    _show(found, document["rows"], document, network, display)
    document["files"] = _write(found, config.get("out"), display)
    if config.get("out"):
        document["files"].append(_rates(found, device, config, Path(str(config["out"]))))
    if asked.save:
        _keep(document)
    return document


def _show(
    found: Sequence[Measured],
    rows: Sequence[Mapping[str, Any]],
    document: Mapping[str, Any],
    network: Network,
    display: Display,
) -> None:
    plan = found[0].plan
    spec = found[0].setup.spec
    baseline = document["baseline"]
    display.note(
        f"EMULATED: hosts run one at a time on {document['hardware']}, {spec.dtype}, {spec.threads} thread(s); network "
        f"{network.name}: {network.intra_gb_per_s:g} GB/s and {network.intra_us:g} us inside, "
        f"{network.inter_gb_per_s:g} GB/s and {network.inter_us:g} us between machines of {network.hosts_per_node}.",
        style="bold",
    )
    display.note(baseline["told"])
    times, spent = [], []
    for each, row in zip(found, rows, strict=True):
        host, hosts = row["slowest_host"], row["hosts"]
        over = document["ratios"].get(f"{each.name} over full")
        name = f"{each.name}, {hosts} host{'s' if hosts > 1 else ''}"
        times.append([name, seconds(row["seconds"]["median"]), seconds(row["best_s"]["median"])])
        if over is not None:
            limit = document["limits"][each.name]
            low, high = over["iqr"]
            times[-1] += [f"{over['median']:.2f}x", f"{low:.2f} to {high:.2f}"]
            times[-1] += [f"{limit['equal_rates']:.2f}x", f"{limit['measured_rates']:.2f}x"]
        spent.append([name, *(f"{host[part]:.3f}" for part in PARTS), seconds(row["exposed_s"]["median"])])
        spent[-1] += [
            f"{max(row['idle_s']) / row['ordered_s']['median']:.0%}",
            size(sum(row["bytes_by_kind"].values())),
        ]
    title = f"{plan.lengths.context + plan.lengths.query:,} tokens to the first token's logits, emulated"
    columns = ["", "no overlap", "all hidden", "over full", "interquartile", "limit", "at these rates"]
    display.table(title, columns, times)
    display.table(
        "Where the slowest host's time goes, seconds", ["", *PARTS, "exposed", "most idle", "all send"], spent
    )
    display.note(
        "no overlap, all hidden: the two ends; speed-ups compare pessimistic ends round by round, median and "
        "interquartile range. limit: what FLOPs allow, at one rate for all and at full attention's own rates. "
        "exposed: what the network adds as the code orders it. most idle: of any host, share of the whole.",
        style="dim",
    )


def _write(found: Sequence[Measured], out: str | None, display: Display) -> list[str]:
    if not out:
        return []
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    traces = {each.name: each.programs[each.middle] for each in found}
    (folder / "traces.json").write_text(json.dumps(traces), encoding="utf-8")
    timelines = {each.name: each.times[each.middle].ordered for each in found}
    return ["traces.json", *drawn(lambda: draw(timelines, folder / "gantt.png"), display.note)]


def _rates(found: Sequence[Measured], device: Device, config: Mapping[str, Any], out: Path) -> str:
    """Write the rates that ``apb bench simulate`` reads: kernels at these sizes, and what all else took."""
    plan = found[0].plan
    blocks = {host.block_len for each in found for host in each.plan.host_plans}
    sizes = sorted({max(16, n) for block in blocks for n in (block // 4, block)} | {max(16, plan.lengths.query)})
    question = max(1, plan.lengths.question)
    calls = measured(device, sizes, question, compressor("query"), lambda done, total: None)
    seconds_spent = [sum(part["other"] for part in each.part_s(each.middle)) for each in found]
    tokens = [sum(host.tokens_run for host in each.plan.host_plans) for each in found]
    rest = min(s / t for s, t in zip(seconds_spent, tokens, strict=True)) / plan.shape.layers
    name = f"{hardware(found[0].setup)}, {config['model']['name']}, {device.dtype}"
    as_rates(name, calls, device, rest).save(out / "rates.json", **provenance(config, hardware(found[0].setup)))
    return "rates.json"


def _keep(document: Mapping[str, Any]) -> None:
    """Add one line a strategy to the dated file that ``apb bench report`` reads."""
    shared = {k: v for k, v in document.items() if k not in ("rows", "ratios", "limits", "files")}
    at, kept = time.strftime("%H:%M:%S"), []
    for row in document["rows"]:
        name = row["strategy"]
        over = document["ratios"].get(f"{name} over full")
        mine = {k: v for k, v in document["ratios"].items() if k.startswith(f"{name} over ")}
        limit = document["limits"].get(name)
        key = f"{document['configuration']['model']['name']}/{document['tokens']}/{name}/{row['hosts']}/{at}"
        kept.append((key, {**shared, **row, "over_full": over, "ratios": mine, "limit": limit}))
    keep("emulate", kept)
