"""``apb bench decode``: every decoder on the same caches, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb.engine import Engine
from bench import report
from bench.decode.links import HOSTS, winners
from bench.decode.measure import PLAIN, decoders, label, measure
from bench.decode.pictures import draw
from bench.decode.questions import questions
from bench.hardware import hardware
from bench.rows import Rows, provenance
from bench.ruler.variant import Variant
from bench.timing import spread
from burst.errors import UserError
from launch.display import Display, seconds, size
from launch.prepare import make_setup
from launch.settings import Basics, basics, decode_settings, in_range, typed

ALL = "all"


@dataclass(frozen=True)
class DecodeBench:
    """conf/bench/decode.yaml."""

    kinds: tuple[str, ...]
    contexts: tuple[int, ...]
    prompts: int
    new_tokens: int
    sizes: tuple[int, ...]
    data: str | None
    save: bool


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Measure what is not kept yet, show the summary and return the document."""
    own = config["bench"]
    common = typed(Basics, basics({**config, **{key: own[key] for key in ("dtype", "device", "timeout_s")}}), "")
    asked = typed(DecodeBench, own, "bench.")
    for key, least in (("prompts", 1), ("new_tokens", 2)):
        in_range(f"bench.{key}", getattr(asked, key), getattr(asked, key) >= least, f"{least} or more")
    in_range("bench.contexts", list(asked.contexts), min(asked.contexts, default=-1) >= 0, "one or more, 0 or longer")
    in_range("bench.sizes", list(asked.sizes), all(s >= 2 for s in asked.sizes), "2 or more each")
    decode = decode_settings(config["decode"], common.model)
    setup = make_setup(common, display, decode.draft)
    made = decoders(decode.decoder, asked.sizes)
    items = questions(asked.kinds, asked.prompts, asked.contexts, asked.data)
    prompts = [item.prompt(setup.tokenizer) for item in items]
    for prompt in prompts:  # what cannot be done is said before anything is loaded
        setup.plan(prompt, asked.new_tokens)
    about = {
        "model": common.model,
        "dtype": setup.spec.dtype,
        "variant": Variant(common.model, setup).label,
        "draft": None if decode.draft is None else str(decode.draft),
        "sampling": [decode.temperature, decode.top_p, decode.top_k, decode.seed],
        "new_tokens": asked.new_tokens,
        "placement": decode.placement,
    }
    base = "/".join(map(str, about.values()))
    kept = Rows(Path(common.out) / "decode.jsonl" if common.out else None)
    todo = [
        (item, prompt, missing)
        for item, prompt in zip(items, prompts, strict=True)
        if (missing := [name for name in made if f"{base}/{item.key}/{name}" not in kept])
    ]
    shared = about | provenance(config, hardware(setup))
    if todo:
        with display.waiting(f"Starting {setup.hosts} {common.cluster.name} host(s)"):
            engine = Engine.launch(setup, cluster=common.cluster.name)
        with engine, display.progress() as on_progress:
            for done, (item, prompt, missing) in enumerate(todo):
                on_progress("Questions", done, len(todo))
                # Plain decoding always runs: the others are compared with it in the same run.
                chosen = [(name, each) for name, each in made.items() if name == PLAIN or name in missing]
                for row in measure(engine, prompt, decode, chosen, asked.new_tokens):
                    where = {"kind": item.kind, "context": item.context, "number": item.number}
                    kept.add(f"{base}/{item.key}/{row['decoder']}", {**shared, **where, **row})
    rows = [row for row in kept if row["key"].startswith(f"{base}/")]
    lines = summary(rows, [*asked.kinds, ALL])
    regions = winners([x for x in lines if x["kind"] == ALL], setup.shape)
    _show(lines, regions, label(decode.decoder), display)
    if asked.save:
        dated = Rows(report.dated("decode.jsonl"))
        for row in rows:
            dated.add(row["key"], row)
    document = {"bench": "decode", **about, "counts_bonus_token": True, "lines": lines, "trees_and_chains": regions}
    return document | {"plots": _plots(lines, regions, common.out, display)}


def summary(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Return a line for every kind, context and decoder. Answers that repeat themselves are counted and left out.

    ``accepted_length``: tokens decided by a step, the bonus token included, over all answers; plain decoding's is 1.
    """
    plain = {(r["kind"], r["context"], r["number"]): r for r in rows if r["decoder"] == PLAIN}
    looped = {where for where, r in plain.items() if r["repeats"]}
    found = []
    for kind in dict.fromkeys([*(r["kind"] for r in rows), *kinds]):
        for context in sorted({r["context"] for r in rows}):
            for name in dict.fromkeys(r["decoder"] for r in rows):
                here = [
                    r for r in rows if r["decoder"] == name and r["context"] == context and kind in (ALL, r["kind"])
                ]
                counted = [r for r in here if (r["kind"], context, r["number"]) not in looped and r["steps"]]
                if counted:
                    line = {"kind": kind, "context": context, "decoder": name, "left_out": len(here) - len(counted)}
                    found.append(line | _line(counted, plain))
    return found


def _line(rows: Sequence[dict[str, Any]], plain: Mapping[tuple[str, int, int], dict[str, Any]]) -> dict[str, Any]:
    total = {key: sum(r[key] for r in rows) for key in ("steps", "decided", "rows", "head_rows", "bytes", "draft_s")}
    steps = total["steps"]
    pairs = [(r, plain[r["kind"], r["context"], r["number"]]) for r in rows]
    return {
        "answers": len(rows),
        "same": sum(r["same"] for r in rows),
        "accepted_length": total["decided"] / steps,
        "rows_per_step": total["rows"] / steps,
        "head_rows_per_step": total["head_rows"] / steps,
        "draft_per_step_s": total["draft_s"] / steps,
        "work_per_step_s": sum(r["work_s"] for r in rows) / steps,
        "bytes_per_step": total["bytes"] / steps,
        "tokens_per_s": spread([r["tokens_per_s"] for r in rows if r["tokens_per_s"]] or [0.0]),
        "speedup": spread([r["tokens_per_s"] / p["tokens_per_s"] for r, p in pairs if r["tokens_per_s"]] or [0.0]),
    }


def _show(lines: Sequence[dict[str, Any]], regions: Sequence[dict[str, Any]], chosen: str, display: Display) -> None:
    columns = ["", "accepted", "rows", "LM-head rows", "draft", "work a token", "sent", "tokens/s", "of plain", "same"]
    for kind, context in dict.fromkeys((x["kind"], x["context"]) for x in lines):
        here = [x for x in lines if (x["kind"], x["context"]) == (kind, context)]
        rows = [
            [
                f"{x['decoder']}{' (chosen)' if x['decoder'] == chosen else ''}",
                f"{x['accepted_length']:.2f}",
                f"{x['rows_per_step']:.1f}",
                f"{x['head_rows_per_step']:,.0f}",
                seconds(x["draft_per_step_s"]),
                seconds(x["work_per_step_s"] / x["accepted_length"]),
                size(round(x["bytes_per_step"])),
                f"{x['tokens_per_s']['median']:.1f}",
                f"{x['speedup']['median']:.2f}x",
                f"{x['same']}/{x['answers']}",
            ]
            for x in here
        ]
        left_out = here[0]["left_out"]
        title = f"{kind}, {context:,} tokens before the question" + (f"; {left_out} loops left out" if left_out else "")
        display.table(title, columns, rows)
    display.note(
        "accepted: tokens a step, bonus token counted. rows: tokens verified a step. draft, sent: a step; bytes of all "
        "hosts. work a token: the drafting host's own, waiting left out. same: answers equal to plain decoding's.",
        style="dim",
    )
    if regions:
        rows = [
            [
                f"{r['context']:,} tokens, {r['link']}",
                f"{r['tree']}: {r['tree_tokens_per_s']:.1f}",
                f"{r['chain']}: {r['chain_tokens_per_s']:.1f}",
                f"{r['plain_tokens_per_s']:.1f}",
                r["faster"],
            ]
            for r in regions
        ]
        title = f"Tokens/s on {HOSTS} hosts: measured compute, modelled links"
        display.table(title, ["", "best tree", "best chain", "plain", "faster"], rows)


def _plots(
    lines: Sequence[dict[str, Any]], regions: Sequence[dict[str, Any]], out: str | None, display: Display
) -> list[str]:
    if out is None:
        display.note("Nothing was kept: with out=DIR rows and plots are, and a stopped run goes on.")
        return []
    try:
        return draw(lines, regions, Path(out))
    except UserError as error:  # the numbers are worth having without pictures
        display.note(f"No plots: {error.message}; {error.allowed}.")
        return []
