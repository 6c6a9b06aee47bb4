"""``apb ask``: a question about a document, answered by hosts that share the prefill."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from apb.engine.engine import Engine, Result
from apb.engine.setup import Setup
from launch.config.build import settle
from launch.config.settings import AskSettings
from launch.terminal.arguments import Arguments
from launch.terminal.display import Display, seconds, size
from launch.terminal.document import FACT, read
from launch.verbs.prefill.prepare import check_fits, cores, in_chunks, make_setup, sharing


def run(arguments: Arguments, config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Answer, show what it cost, and return the JSON document; raises UserError before any host starts."""
    settings = settle(AskSettings, config)
    document, question = read(arguments, settings.needle_depth)
    if arguments.document is None:
        display.note("No document given (-d FILE): Python's language reference is read, with one fact planted in it:")
        display.note(f"  {FACT}")
    setup = make_setup(settings, display, settings.decode)
    setups = [setup, setup.using("full", hosts=1)] if settings.compare else [setup]
    setups = [_checked(each, settings, document, question, display) for each in setups]
    display.note(f"Question: {question}")
    results = [_answer(each, settings, document, question, display) for each in setups]
    _show(results, setup, settings, display)
    found = _document(results[0], settings)
    if settings.compare:
        other = _document(results[1], settings)
        faster = other["prefill_s"] / found["prefill_s"]
        found |= {"compare": other | {"speedup": faster}, "speedup": faster}
    return found


def _checked(setup: Setup, settings: AskSettings, document: str, question: str, display: Display) -> Setup:
    """Return the setup with its chunks chosen; raises UserError for what does not fit."""
    prompt = setup.prompt(document, question, chat=settings.chat, question_first=settings.question_first)
    setup = setup.covering(len(prompt.token_ids) + settings.decode.max_new_tokens)
    setup, plan = in_chunks(setup, setup.plan(prompt, settings.decode.max_new_tokens), settings, display)
    room = check_fits(setup, plan, settings)
    if room.available is None:
        display.note("Memory is not checked: the hosts may stand on other machines.")
    return setup


def _answer(setup: Setup, settings: AskSettings, document: str, question: str, display: Display) -> Result:
    decode, name = settings.decode, settings.cluster.name
    hosts = f"{setup.hosts} {name} host{'s' if setup.hosts > 1 else ''}"
    with display.waiting(f"Starting {hosts} for strategy {setup.strategy.name}"):
        engine = Engine.launch(setup, cluster=settings.cluster)
    with engine:
        what = "Prefill, layers of host 0" if setup.hosts > 1 else "Prefill, layers"
        with display.progress() as on_progress:
            start = time.perf_counter()
            on_progress(what, 0, setup.shape.layers)
            handle = engine.prefill(
                document,
                question,
                chat=settings.chat,
                question_first=settings.question_first,
                max_new_tokens=decode.max_new_tokens,
                on_layer=lambda done, total: on_progress(what, done, total),
            )
        display.note(f"Prefill: {seconds(time.perf_counter() - start)}", style="dim")
        display.raw("Answer: ")
        try:
            result = engine.generate(
                handle,
                decode.max_new_tokens,
                decode=decode.decoder,
                placement=decode.placement,
                temperature=decode.temperature,
                top_p=decode.top_p,
                top_k=decode.top_k,
                seed=decode.seed,
                stop=decode.stop,
                on_token=display.raw,
            )
        finally:
            display.raw("\n")
        return dataclasses.replace(result, metrics=result.metrics | {"threads": setup.spec.threads})


def _document(result: Result, settings: AskSettings) -> dict[str, Any]:
    measured = result.metrics
    return {
        "answer": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        **measured,
        "model": settings.model,
        "model_path": measured["model"],
    }


def _show(results: list[Result], setup: Setup, settings: AskSettings, display: Display) -> None:
    """Show the strategy's numbers, and full attention's beside them."""
    all_metrics = [r.metrics for r in results]
    first = all_metrics[0]
    rows = [[label, *(write(m) for m in all_metrics)] for label, write in _ROWS]
    for kind in sorted({kind for m in all_metrics for kind in m["bytes_by_kind"]}):
        label = f"  {_KINDS.get(kind, kind)}"
        rows.append([label, *(size(m["bytes_by_kind"].get(kind, 0)) for m in all_metrics)])
    columns = ["", *(m["strategy"] for m in all_metrics)]
    if len(results) > 1:
        columns.append("speed-up")
        ratios = {label: all_metrics[1][key] / first[key] for label, key in _TIMES.items() if first[key]}
        work = [(sum(m["host_work_s"]), max(m["host_work_s"])) for m in all_metrics]
        ratios["compute of the busiest host"] = work[1][1] / work[0][1]
        rows = [[*row, f"{ratios[row[0]]:.2f}x" if row[0] in ratios else ""] for row in rows]
    display.note("")
    display.table(f"{settings.model} on {settings.cluster.name}", columns, rows)
    if sharing(settings, setup.spec.device, first["hosts"]) > 1:
        display.note(_caution(all_metrics, settings, setup.spec.device))


def _caution(all_metrics: Sequence[Mapping[str, Any]], settings: AskSettings, device: str) -> str:
    """Say which times mean something where hosts share one machine, and what each run had of it."""
    shown, *others = all_metrics
    hosts, threads, n = shown["hosts"], shown["threads"], cores()
    here, each = _count(n, "core"), _count(threads, "thread")
    local = sharing(settings, device, hosts)
    virtual = settings.cluster.one_process
    who = f"{'' if local == hosts else f'{local} of '}{shown['strategy']}'s {hosts} hosts"
    how = f"took turns in one process of {each}" if virtual else f"shared this machine's {here}, {each} each"
    said = f"Wall-clock times above are not those of {hosts} machines: {who} {how}."
    for other in others:
        said += f" {other['strategy']} had the {here} to itself and used {_count(other['threads'], 'thread')}:"
        said += " wall-clock and its speed-up do not compare."
    if not virtual and threads > 1 and threads * local > n:
        return f"{said} Each host's compute (host_work_s) compares with cluster.threads=1 only."
    return (
        f"{said} What compares is each host's own compute (host_work_s): on a machine each, the prefill would take "
        "about as long as the busiest host computes, plus the network."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


_KINDS = {
    "agree": "agreement on the plan",
    "conv": "inputs before a stretch, of linear layers",
    "draft": "the draft head's own keys and values",
    "gather": "the cache, gathered on one host",
    "halo": "rows before a stretch, of windows",
    "kv": "keys and values, exact",
    "latent": "latents, exact",
    "partials": "partial attention of question and answer",
    "passing": "compressed blocks",
    "state": "maps of states, of linear layers",
    "token": "decided tokens",
}
_TIMES = {"prefill": "prefill_s", "time to first token": "ttft_s"}
_ROWS: list[tuple[str, Any]] = [
    ("hosts", lambda m: str(m["hosts"])),
    ("CPU threads a host", lambda m: str(m["threads"])),
    ("context + question, tokens", lambda m: f"{m['context_tokens']:,} + {m['query_tokens']:,}"),
    ("cache equals full attention's", lambda m: "yes" if m["exact"] else "no, approximate"),
    ("prefill", lambda m: seconds(m["prefill_s"])),
    ("time to first token", lambda m: seconds(m["ttft_s"])),
    (
        "decoding, tokens/s",
        lambda m: "-" if m["decode_tokens_per_s"] is None else f"{m['decode_tokens_per_s']:.1f}",
    ),
    (
        "tokens a verification, bonus included",
        lambda m: "-" if m["accepted_length"] is None else f"{m['accepted_length']:.2f}",
    ),
    ("compute of the busiest host", lambda m: seconds(max(m["host_work_s"]))),
    ("compute of all hosts", lambda m: seconds(sum(m["host_work_s"]))),
    ("peak memory of a process", lambda m: size(m["peak_rss_bytes"])),
    ("sent between hosts", lambda m: size(m["bytes_sent"])),
]
