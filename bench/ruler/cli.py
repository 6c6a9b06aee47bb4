"""``apb bench ruler``: settings made into variants and samples, results shown and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apb.engine.setup import Setup
from bench.ruler import TASKS, sample
from bench.ruler.answers import FullAnswers
from bench.ruler.official import read
from bench.ruler.plots import draw
from bench.ruler.prompts import prompt
from bench.ruler.run import RulerSamples
from bench.ruler.run import run as run_samples
from bench.ruler.summary import CHOOSE, chosen, comparisons, latest, table
from bench.ruler.variant import Variant, baselines
from bench.settings import RulerSettings
from bench.tools.conditions import conditions
from bench.tools.drawing import drawn
from bench.tools.rows import RowStore
from burst.errors import UserError, in_range
from launch.config.build import basics
from launch.config.settings import Basics
from launch.config.typed import typed
from launch.terminal.display import Display, size
from launch.verbs.prefill.prepare import make_setup

FILE = "samples.jsonl"


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Measure one variant and its baselines; show and return tables and comparisons over all that ``out`` holds."""
    own = config["bench"]
    common = typed(Basics, basics({**config, **{key: own[key] for key in ("dtype", "device", "timeout_s")}}), "")
    asked = _settle(own)
    setup = make_setup(common, display)
    variant = Variant(common.model, setup, asked.question_first, asked.plain, asked.flops, asked.bytes)
    others = [] if asked.seeds == CHOOSE else baselines(variant)  # to choose, the variants themselves are enough
    variants = list({v.label: v for v in (*others, variant)}.values())
    samples = _samples(setup, asked)
    for each in variants:  # what cannot be done is said before anything is loaded
        for one in filter(each.takes, samples.items[:: asked.samples]):
            asked_for = each.prompt(one)
            each.fitted(asked_for.lengths).plan(asked_for, one.ask.new_tokens)
    folder = Path(common.out) if common.out else None
    kept = RowStore(folder and folder / FILE)
    with display.progress() as on_progress:
        what = f"Samples, {variant.label} and its baselines"
        run_samples(
            variants,
            samples,
            kept,
            FullAnswers(folder),
            common.cluster.name,
            decode=asked.decode,
            on_sample=lambda done, total: on_progress(what, done, total),
        )
    rows = latest(kept)
    lines, stated = table(rows), comparisons(rows)
    picked = [
        {**dict(zip(("model", "tokens", "strategy"), k, strict=True)), "compressor": v} for k, v in chosen(rows).items()
    ]
    _show(lines, stated, samples, setup.spec.dtype, display)
    found: dict[str, Any] = {"variant": variant.label, "samples": len(rows), "table": lines, "chosen": picked}
    found |= {"comparisons": stated, "conditions": conditions()}
    return found | _write(found, folder, display)


def _settle(values: Mapping[str, Any]) -> RulerSettings:
    flops = values["flops"]
    settings = typed(RulerSettings, {**values, "flops": None}, "bench.")
    in_range("bench.samples", settings.samples, settings.samples >= 1, "1 or more")
    in_range("bench.tokens", settings.tokens, settings.tokens >= 1, "1 or more")
    in_range("bench.bytes", settings.bytes, settings.bytes is None or settings.bytes >= 0, "0 or more")
    in_range("bench.plain", settings.plain, not (settings.plain and settings.question_first), "not both of them")
    fine = flops is None or isinstance(flops, str) or (isinstance(flops, float | int) and 0 < flops <= 1)
    in_range("bench.flops", flops, fine, "null, a strategy's name, or a share of full attention up to 1")
    share = float(flops) if isinstance(flops, float | int) else flops
    return RulerSettings(**{**settings.__dict__, "flops": share})


def _samples(setup: Setup, asked: RulerSettings) -> RulerSamples:
    tokenizer = setup.tokenizer
    if asked.data is None:
        names = asked.tasks or tuple(TASKS)
        made = [sample(tokenizer, task, asked.tokens, asked.seeds, i) for task in names for i in range(asked.samples)]
        return RulerSamples(made, asked.tokens, asked.seeds)
    by_task: dict[str, list[Any]] = {}
    for each in read(tokenizer, Path(asked.data)):
        if not asked.tasks or each.task in asked.tasks:
            by_task.setdefault(each.task, []).append(each)
    found = [each for rows in by_task.values() for each in rows[: asked.samples]]
    if not found:
        raise UserError(
            "none of these tasks is in the data",
            given=", ".join(asked.tasks),
            allowed="tasks with a file of their name",
            remedy="Leave bench.tasks out to take all.",
        )
    longest = max(len(prompt(tokenizer, each).token_ids) for each in found)
    return RulerSamples(found, longest, asked.seeds)


def _show(
    lines: list[dict[str, Any]], stated: list[dict[str, Any]], samples: RulerSamples, dtype: str, display: Display
) -> None:
    asked = {"tokens": samples.tokens, "seeds": samples.seeds, "dtype": dtype}
    here = [x for x in lines if asked.items() <= x.items()]
    for task in dict.fromkeys(x["task"] for x in here):
        rows = [
            [
                x["variant"],
                str(x["samples"]),
                f"{x['log_prob']:.3f}",
                _number(x["kl"]),
                _spread(x, "accuracy"),
                _number(x["second_log_prob"]),
                _spread(x, "second_accuracy"),
                _number(x["flops_share"]),
                size(x["passing_bytes"]),
            ]
            for x in here
            if x["task"] == task
        ]
        columns = ["", "n", "log p", "KL to full", "accuracy", "2nd: log p", "accuracy", "FLOPs", "passed"]
        display.table(f"{task}, {samples.tokens} tokens, {samples.seeds} seeds, {dtype}", columns, rows)
    display.note(
        "log p: of the right answer, nats a token. FLOPs: the busiest host's prefill, share of full attention's. "
        "2nd: another question on the same cache.",
        style="dim",
    )
    here = [x for x in stated if (x["tokens"], x["dtype"]) == (samples.tokens, dtype)]
    if here:
        rows = [
            [
                f"{x['task']}: {x['variant']} - {x['against']}",
                f"{x['difference']:+.3f}",
                f"{x['interval'][0]:+.3f} to {x['interval'][1]:+.3f}",
                f"{x['p_holm']:.4f}",
            ]
            for x in here
        ]
        display.table("Differences in log p", ["", "mean", "95% interval", "p better (Holm)"], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(line: Mapping[str, Any], name: str) -> str:
    low, high = line[f"{name}_interval"] or (0, 0)
    return "-" if line[name] is None else f"{line[name]:.2f} [{low:.2f}, {high:.2f}]"


def _write(found: Mapping[str, Any], folder: Path | None, display: Display) -> dict[str, Any]:
    if folder is None:
        display.note("Nothing was kept: with out=DIR samples, tables and plots are, and a stopped run goes on.")
        return {"plots": []}
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return {"plots": drawn(lambda: draw(found["table"], folder), display.note)}
