"""Tables of dated rows, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apb.engine.setup import Setup
from apb.plan.bytes import prefill_bytes
from apb.plan.memory import host_memory
from apb.plan.plan import PrefillPlan
from bench.decode.cli import ALL, cells, loops
from bench.decode.cli import summary as of_decoders
from bench.report.rows import DECODING, Row, groups
from bench.throughput.cli import summary
from bench.tools.prompts import lengths, setups
from launch.terminal.display import seconds, size

QUERY = 64  # tokens of the question and its template in the growth table
GROWING = ("apb", "spava", "star", "ring", "allgather", "ulysses")
DECODED = (
    "",
    "accepted length, bonus token counted",
    "rows verified a step",
    "LM-head rows a step, drafting",
    "draft a step",
    "verify a step",
    "drafting host's own work a token",
    "all send a step",
    "answers counted (loops left out)",
)


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
        alone = next((sum(row["work_s"]) for row in here if row["strategy"] == "full"), None)
        for row in here:
            over, limit = row["over_full"], row["limit"]
            work = "" if alone is None else f"{sum(row['work_s']) / alone:.3f}; {max(row['work_s']) / alone:.4f}"
            low, high = row["seconds"]["iqr"]
            cells.append(
                [
                    f"`{row['strategy']}`, {row['hosts']} host{'s' if row['hosts'] > 1 else ''}",
                    f"{row['seconds']['median']:.3g} s ({low:.3g}-{high:.3g})",
                    "" if over is None else f"{over['median']:.2f} ({over['iqr'][0]:.2f}-{over['iqr'][1]:.2f})",
                    "" if over is None or limit is None else f"{limit['equal_rates']:.2f}",
                    work if row["strategy"] != "full" else "",
                    seconds(row["exposed_s"]["median"]),
                    size(sum(row["bytes_by_kind"].values())),
                ]
            )
        headers = (
            "",
            "to first token, nothing hidden",
            "times faster",
            "FLOPs allow",
            "own work of full's: all hosts; slowest",
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


def decoders(rows: Sequence[Row]) -> list[str]:
    """Return a table for the decode rows of every model, device and setting: all kinds of questions together."""
    lines: list[str] = []
    for values, here in groups(rows, *DECODING).items():
        model, device, dtype, variant, _, sampling, new_tokens, placement = values
        looped: dict[int, int] = {}
        for x in loops(here):
            looped[x["context"]] = looped.get(x["context"], 0) + x["loops"]
        chosen = f"temperature {sampling[0]:g}" if sampling[0] else "greedy"
        what = f"Decoders, {model}, {dtype}, {variant}, {placement}, {chosen}, up to {new_tokens} tokens an answer"
        lines += ["", _about(what, device, here, "means over the steps of all answers"), ""]
        counted = [x for x in of_decoders(here) if x["kind"] == ALL]
        table = [
            [f"{x['decoder']}, {x['context']:,} tokens", *cells(x), f"{x['answers']} ({looped[x['context']]})"]
            for x in counted
        ]
        for context in sorted(looped.keys() - {x["context"] for x in counted}):
            table.append([f"all, {context:,} tokens", *["-"] * (len(DECODED) - 2), f"0 ({looped[context]})"])
        commands = dict.fromkeys(row["command"] for row in here)
        lines += [*markdown(DECODED, table), "", *(f"`{command}`" for command in commands)]
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
            sent.append(size(max(sum(prefill_bytes(plan, r).values()) for r in range(count))))
        cells.append([f"`{setup_of}`", " / ".join(memory), " / ".join(sent)])
    contexts = " / ".join(f"{count * block // 1024:,}k" for count in hosts)
    shown = " / ".join(map(str, hosts))
    about = (
        f"The most that any host holds beside the weights, and sends, when hosts are added at {block:,} context tokens "
        f"each ({shown} hosts, {contexts} tokens; {base.spec.model_path}, {base.spec.dtype}; from the plans):"
    )
    return ["", about, "", *markdown(("", "KV and activations", "sent before the question"), cells)]


def _beside_weights(plan: PrefillPlan) -> int:
    memories = (host_memory(plan, rank) for rank in range(plan.hosts))
    return max(each["kv"] + each["activations"] for each in memories)


def _about(what: str, device: str, rows: Sequence[Row], shown: str = "median (interquartile range)") -> str:
    versions = rows[-1]["versions"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    dates = ", ".join(dict.fromkeys(row["date"] for row in rows))
    return f"{what}; {device}, torch {versions['torch']}; commit {commits}, {dates}; {shown}:"


def _range(found: dict[str, Any], unit: str = "") -> str:
    low, high = found["iqr"]
    return f"{found['median']:.3g}{unit} ({low:.3g}-{high:.3g})"
