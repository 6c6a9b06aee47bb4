"""``apb bench decode``: every decoder on the same caches, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apb.engine.engine import Engine
from bench.decode.links import winners
from bench.decode.measure import PLAIN, decoders, label, measure, shape
from bench.decode.pictures import draw
from bench.decode.questions import questions
from bench.ruler.variant import Variant
from bench.settings import DecodeBench
from bench.tools.conditions import hardware, provenance
from bench.tools.drawing import drawn
from bench.tools.rows import RowStore, keep
from bench.tools.timing import spread
from burst.errors import in_range
from launch.config.build import basics, decode_settings
from launch.config.settings import Basics
from launch.config.typed import typed
from launch.terminal.display import Display, seconds, size
from launch.verbs.prefill.prepare import make_setup

ALL = "all"
WARM = 2  # verifications


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
    setup = make_setup(common, display, decode)
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
    kept = RowStore(Path(common.out) / "decode.jsonl" if common.out else None)
    keys = {item.key: {name: f"{base}/{item.key}/{name}" for name in made} for item in items}
    # An item is measured whole or not at all: what is compared has run side by side.
    todo = [each for each in zip(items, prompts, strict=True) if any(k not in kept for k in keys[each[0].key].values())]
    shared = about | provenance(config, hardware(setup))
    if todo:
        with display.waiting(f"Starting {setup.hosts} {common.cluster.name} host(s)"):
            engine = Engine.launch(setup, cluster=common.cluster)
        with engine, display.progress() as on_progress:
            measure(engine, todo[0][1], decode, list(made.items()), 2 * WARM)  # the first runs are slower
            for done, (item, prompt) in enumerate(todo):
                on_progress("Questions", done, len(todo))
                where = {"kind": item.kind, "context": item.context, "number": item.number, "question": item.text}
                for row in measure(engine, prompt, decode, list(made.items()), asked.new_tokens):
                    row["shape"] = shape(made[row["decoder"]])
                    kept.add(keys[item.key][row["decoder"]], {**shared, **where, **row})
    wanted = {key for names in keys.values() for key in names.values()}
    rows = [row for row in kept if row["key"] in wanted]
    lines, left_out = summary(rows), loops(rows)
    regions = winners([x for x in lines if x["kind"] == ALL], setup.shape)
    _show(lines, left_out, regions, label(decode.decoder), display)
    if asked.save:
        keep("decode", ((row["key"], row) for row in rows))
    document = {
        "bench": "decode",
        **about,
        "counts_bonus_token": True,
        "left_out": left_out,
        "lines": lines,
        "trees_and_chains": regions,
    }
    return document | {"plots": _plots(lines, regions, common.out, display)}


def loops(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how many answers of every kind and context are left out: those that repeat themselves."""
    plain = [r for r in rows if r["decoder"] == PLAIN]
    places = dict.fromkeys((r["kind"], r["context"]) for r in plain)
    return [
        {
            "kind": kind,
            "context": context,
            "answers": sum((r["kind"], r["context"]) == (kind, context) for r in plain),
            "loops": sum(r["repeats"] and (r["kind"], r["context"]) == (kind, context) for r in plain),
        }
        for kind, context in places
    ]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for every kind, context and decoder, loops left out, and for all kinds together.

    ``accepted_length``: tokens decided by a step, the bonus token included, over all answers; plain decoding's is 1. An
    answer of one token, which the prefill decides, counts for none.
    """
    plain = {(r["kind"], r["context"], r["number"]): r for r in rows if r["decoder"] == PLAIN}
    looped = {where for where, r in plain.items() if r["repeats"]}
    counted = [r for r in rows if r["steps"] and (r["kind"], r["context"], r["number"]) not in looped]
    found = []
    for kind in dict.fromkeys([*(r["kind"] for r in counted), ALL]):
        for context in sorted({r["context"] for r in counted}):
            of_kind = [r for r in counted if r["context"] == context and kind in (ALL, r["kind"])]
            for name in dict.fromkeys(r["decoder"] for r in of_kind):
                here = [r for r in of_kind if r["decoder"] == name]
                line = {"kind": kind, "context": context, "decoder": name, "shape": here[0]["shape"]}
                found.append(line | _line(here, plain))
    return found


def _line(rows: Sequence[dict[str, Any]], plain: Mapping[tuple[str, int, int], dict[str, Any]]) -> dict[str, Any]:
    total = {
        key: sum(r[key] for r in rows)
        for key in ("steps", "decided", "rows", "head_rows", "bytes", "draft_s", "verify_s")
    }
    steps = total["steps"]
    pairs = [(r, plain[r["kind"], r["context"], r["number"]]) for r in rows]
    return {
        "answers": len(rows),
        "same": sum(r["same"] for r in rows),
        "accepted_length": total["decided"] / steps,
        "rows_per_step": total["rows"] / steps,
        "head_rows_per_step": total["head_rows"] / steps,
        "draft_per_step_s": total["draft_s"] / steps,
        "verify_per_step_s": total["verify_s"] / steps,
        "work_per_step_s": sum(r["work_s"] for r in rows) / steps,
        "bytes_per_step": total["bytes"] / steps,
        "tokens_per_s": spread([r["tokens_per_s"] for r in rows if r["tokens_per_s"]] or [0.0]),
        "speedup": spread([r["tokens_per_s"] / p["tokens_per_s"] for r, p in pairs if r["tokens_per_s"]] or [0.0]),
    }


def cells(line: Mapping[str, Any]) -> list[str]:
    """Return a line's accepted length, rows, LM-head rows, draft, verify, own work a token, and bytes, to be read."""
    return [
        f"{line['accepted_length']:.2f}",
        f"{line['rows_per_step']:.1f}",
        f"{line['head_rows_per_step']:,.0f}",
        seconds(line["draft_per_step_s"]),
        seconds(line["verify_per_step_s"]) if line["verify_per_step_s"] else "-",
        seconds(line["work_per_step_s"] / line["accepted_length"]),
        size(round(line["bytes_per_step"])),
    ]


def _show(
    lines: Sequence[dict[str, Any]],
    left_out: Sequence[dict[str, Any]],
    regions: Sequence[dict[str, Any]],
    chosen: str,
    display: Display,
) -> None:
    columns = ["", "accepted", "rows", "head rows", "draft", "verify"]
    columns += ["work/token", "sent", "tokens/s", "of plain", "same"]
    for kind, context in dict.fromkeys((x["kind"], x["context"]) for x in lines):
        here = [x for x in lines if (x["kind"], x["context"]) == (kind, context)]
        rows = [
            [
                f"{x['decoder']}{' (chosen)' if x['decoder'] == chosen else ''}",
                *cells(x),
                f"{x['tokens_per_s']['median']:.1f}",
                f"{x['speedup']['median']:.2f}x",
                f"{x['same']}/{x['answers']}",
            ]
            for x in here
        ]
        display.table(f"{kind}, {context:,} tokens before the question", columns, rows)
    for x in left_out:
        if x["loops"]:
            where = f"{x['kind']}, {x['context']:,} tokens"
            display.note(f"{where}: {x['loops']} of {x['answers']} answers repeat themselves and are left out.")
    display.note(
        "A step is a verification. accepted: tokens a step, bonus token counted. rows: tokens verified. head rows: "
        "of the draft's LM head. sent: bytes of all hosts. work/token: the drafting host's own, waiting left out. same:"
        " answers equal to plain decoding's.",
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
        title = f"Tokens/s, this compute and modelled links among {regions[0]['hosts']} hosts"
        display.table(title, ["", "best tree", "best chain", "plain", "faster"], rows)


def _plots(
    lines: Sequence[dict[str, Any]], regions: Sequence[dict[str, Any]], out: str | None, display: Display
) -> list[str]:
    if out is None:
        display.note("Nothing was kept: with out=DIR rows and plots are, and a stopped run goes on.")
        return []
    return drawn(lambda: draw(lines, regions, Path(out)), display.note)
