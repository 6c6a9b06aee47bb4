"""README's tables, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apb.plan import PrefillPlan
from apb.setup import Setup
from bench.prompts import lengths, setups
from bench.readme.rows import Row, groups
from bench.throughput.cli import summary
from launch.display import seconds, size

QUERY = 64  # tokens of the question and its template in the growth table
GROWING = ("apb", "spava", "star", "ring", "allgather", "ulysses")


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def emulated(rows: Sequence[Row]) -> list[str]:
    """Return a table for every set of emulated rows of one model, length, device and network."""
    lines: list[str] = []
    keys = ("configuration.model.name", "hardware", "tokens", "configuration.network.name")
    for (model, device, tokens, network), here in groups(rows, *keys).items():
        lines += ["", _about(f"**Emulated** hosts, {model}, {tokens:,} tokens, network {network}", device, here), ""]
        cells = []
        for row in here:
            over, limit = row["over_full"], row["limit"]
            low, high = row["seconds"]["iqr"]
            cells.append(
                [
                    f"`{row['strategy']}`, {row['hosts']} host{'s' if row['hosts'] > 1 else ''}",
                    f"{row['seconds']['median']:.3g} s ({low:.3g}-{high:.3g})",
                    "" if over is None else f"{over['median']:.2f} ({over['iqr'][0]:.2f}-{over['iqr'][1]:.2f})",
                    "" if over is None or limit is None else f"{limit['equal_rates']:.2f}",
                    seconds(row["exposed_s"]["median"]),
                    size(sum(row["bytes_by_kind"].values())),
                ]
            )
        headers = (
            "",
            "to first token, nothing hidden",
            "times faster",
            "FLOPs allow",
            "network",
            "all send",
        )
        lines += [*markdown(headers, cells), "", f"`{here[-1]['command']}`"]
    return lines


def measured(rows: Sequence[Row]) -> list[str]:
    """Return a table for the throughput rows of every model and device: medians of the repetitions."""
    lines: list[str] = []
    for (model, device), here in groups(rows, "model", "hardware").items():
        lines += ["", _about(f"Measured, {model}", device, here), ""]
        cells = []
        for (variant, cluster, tokens), mine in groups(here, "variant", "cluster", "tokens").items():
            found = summary(mine)
            decode = found["decode_tokens_per_s"]
            cells.append(
                [
                    f"{variant}, {cluster}, {tokens:,} tokens",
                    _range(found["ttft_s"], " s"),
                    _range(found["prefill_tokens_per_s"]),
                    "-" if decode is None else _range(decode),
                    f"{found['share_of_limit']['median']:.0%}",
                    size(found["peak_device_bytes"] or found["peak_rss_bytes"]),
                ]
            )
        headers = ("", "time to first token", "prefill tokens/s", "decode tokens/s", "of the limit", "peak memory")
        lines += [*markdown(headers, cells), "", f"`{here[-1]['command']}`"]
    return lines


def growth(base: Setup, hosts: Sequence[int], block: int) -> list[str]:
    """Return how a host's memory and bytes grow when hosts are added at the same block; from plans alone."""
    cells = []
    for setup_of in GROWING:
        memory, sent = [], []
        for count in hosts:
            (setup,) = setups(base, [setup_of], count, None)
            plan = setup.strategy.plan(lengths(count * block + QUERY, QUERY), count, setup.shape, setup.compressor)
            memory.append(size(_beside_weights(plan)))
            sent.append(size(max(sum(plan.prefill_bytes(r).values()) for r in range(count))))
        cells.append([f"`{setup_of}`", " / ".join(memory), " / ".join(sent)])
    contexts = " / ".join(f"{count * block // 1024:,}k" for count in hosts)
    shown = " / ".join(map(str, hosts))
    about = (
        f"The most that any host holds beside the weights, and sends, when hosts are added at {block:,} context tokens "
        f"each ({shown} hosts, {contexts} tokens; {base.spec.model_path}, {base.spec.dtype}; from the plans):"
    )
    return ["", about, "", *markdown(("", "KV and activations", "sent before the question"), cells)]


def _beside_weights(plan: PrefillPlan) -> int:
    memories = (plan.memory(rank) for rank in range(plan.hosts))
    return max(each["kv"] + each["activations"] for each in memories)


def _about(what: str, device: str, rows: Sequence[Row]) -> str:
    versions = rows[-1]["versions"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    dates = ", ".join(dict.fromkeys(row["date"] for row in rows))
    return f"{what}; {device}, torch {versions['torch']}; commit {commits}, {dates}; median (interquartile range):"


def _range(found: dict[str, Any], unit: str = "") -> str:
    low, high = found["iqr"]
    return f"{found['median']:.3g}{unit} ({low:.3g}-{high:.3g})"
