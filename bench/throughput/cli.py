"""``apb bench throughput``: one case measured, row by row, on any cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apb.engine.setup import Setup
from bench.kernels.measure import Device
from bench.ruler.variant import Variant
from bench.settings import ThroughputSettings
from bench.throughput.measure import EveryToken, Source, measure, utilisation
from bench.tools.conditions import hardware, provenance
from bench.tools.rows import RowStore, keep
from bench.tools.timing import spread
from burst.errors import in_range
from launch.config.build import basics
from launch.config.settings import Basics
from launch.config.typed import typed
from launch.terminal.display import Display, seconds, size
from launch.verbs.prefill.prepare import make_setup

PARTS = ("tokenise_s", "ship_s", "prefill_s", "first_step_s")
TIMES = ("ttft_s", *PARTS, "prefill_tokens_per_s", "decode_tokens_per_s", "flops_utilisation", "share_of_limit")


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Measure what is not kept yet, show the medians and return the document."""
    own = config["bench"]
    common = typed(Basics, basics({**config, **{key: own[key] for key in ("dtype", "device", "timeout_s")}}), "")
    asked = typed(ThroughputSettings, own, "bench.")
    for key, least in (("tokens", 1), ("new_tokens", 1), ("repeats", 1), ("warmup", 0)):
        in_range(f"bench.{key}", getattr(asked, key), getattr(asked, key) >= least, f"{least} or more")
    setup = make_setup(common, display)
    source = Source(setup, asked.tokens, asked.query_tokens)
    plan = setup.plan(source.prompt(), asked.new_tokens)  # what cannot be done is said before anything is loaded
    variant = Variant(common.model, setup).label
    about = {
        "model": common.model,
        "dtype": setup.spec.dtype,
        "device": setup.spec.device,
        "threads": setup.spec.threads,
        "variant": variant,
        "strategy": plan.strategy,
        "compressor": plan.compressor,
        "cluster": common.cluster.name,
        "hosts": plan.hosts,
        "tokens": asked.tokens,
        "new_tokens": asked.new_tokens,
    }
    key = "/".join(str(value) for value in about.values())
    kept = RowStore(Path(common.out) / "throughput.jsonl" if common.out else None)
    todo = [number for number in range(asked.repeats) if f"{key}/{number}" not in kept]
    if todo:
        device = Device(setup.shape, setup.spec.dtype, setup.spec.device)
        shared = about | provenance(config, hardware(setup))
        for number, row in _measured(setup, source, asked, common, todo, display):
            row |= utilisation(row, plan, device, common.cluster.one_process)
            kept.add(f"{key}/{number}", {**shared, **row})
    rows = [row for row in kept if row["key"].startswith(f"{key}/")]
    found = about | summary(rows)
    _show(found, len(rows), display)
    if common.cluster.one_process:
        display.note("Virtual hosts take turns: wall-clock times are those of all hosts together.", style="dim")
    if asked.save:
        keep("throughput", ((row["key"], row) for row in rows))
    return {"bench": "throughput", **found, "rows": rows}


def _measured(
    setup: Setup, source: Source, asked: ThroughputSettings, common: Basics, todo: list[int], display: Display
) -> Any:
    """Yield the number and the row of every repetition, as soon as it is measured."""
    with display.waiting(f"Starting {setup.hosts} {common.cluster.name} host(s) for {setup.strategy.name}"):
        cluster = common.cluster.start(setup.spec, setup.hosts)
    with EveryToken(setup, cluster) as engine, display.progress() as on_progress:
        what = f"Prefills, {setup.strategy.name}, {source.tokens:,} tokens"
        turns = asked.warmup + len(todo)
        for turn in range(turns):
            on_progress(what, turn, turns)
            row = measure(engine, source, asked.new_tokens)
            if turn >= asked.warmup:
                yield todo[turn - asked.warmup], row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and interquartile ranges; bytes are the same every time."""
    found: dict[str, Any] = {}
    for name in TIMES:
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = spread(values) if values else None
    last = rows[-1]
    found |= {name: last[name] for name in ("prompt_tokens", "bytes_sent", "bytes_by_link", "bytes_by_kind")}
    found["peak_rss_bytes"] = max(row["peak_rss_bytes"] for row in rows)
    found["peak_device_bytes"] = max(row["peak_device_bytes"] for row in rows)
    found["seconds_of"] = last["seconds_of"]
    return found


def _show(found: Mapping[str, Any], count: int, display: Display) -> None:
    def timed(name: str) -> str:
        value = found[name]
        return "-" if value is None else f"{seconds(value['median'])} [{', '.join(map(seconds, value['iqr']))}]"

    def rate(name: str) -> str:
        value = found[name]
        return "-" if value is None else f"{value['median']:.1f} [{', '.join(f'{x:.1f}' for x in value['iqr'])}]"

    rows = [
        ["time to first token", timed("ttft_s")],
        ["  tokenising", timed("tokenise_s")],
        ["  shipping", timed("ship_s")],
        ["  prefill", timed("prefill_s")],
        ["  first step", timed("first_step_s")],
        ["prefill tokens/s", rate("prefill_tokens_per_s")],
        ["decode tokens/s", rate("decode_tokens_per_s")],
        ["FLOPs utilisation", f"{found['flops_utilisation']['median']:.1%} of a large product's rate"],
        ["share of the limit", f"{found['share_of_limit']['median']:.1%} ({found['seconds_of']})"],
        ["peak memory, largest process", size(found["peak_rss_bytes"])],
        *([["peak memory, device", size(found["peak_device_bytes"])]] if found["peak_device_bytes"] else []),
        *[[f"sent, {link}", size(count)] for link, count in sorted(found["bytes_by_link"].items())],
    ]
    what = f"{found['variant']}, {found['prompt_tokens']:,} tokens, {found['cluster']}"
    display.table(f"{what}: median and interquartile range of {count}", ["", found["strategy"]], rows)
