"""``apb plan``: what a prefill would cost, from the model's configuration and tokenizer alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apb.engine.engine import versions
from apb.engine.setup import Setup, needed_bytes
from apb.plan.bytes import bytes_by_kind
from apb.plan.flops import critical_flops, prefill_flops
from apb.plan.memory import Generation, memory_by_kind
from apb.plan.plan import PrefillPlan
from apb.plan.report import host_rows, plan_document
from apb.prompt.prompt import Prompt, Question, make_prompt, separator
from burst.errors import UserError
from launch.config.build import settle
from launch.config.settings import PlanSettings
from launch.terminal.arguments import Arguments
from launch.terminal.display import Display, flops, size
from launch.terminal.document import read
from launch.verbs.prefill.prepare import Room, check_fits, in_chunks, make_setup
from launch.verbs.prefill.schedules import explain


def run(arguments: Arguments, config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Show the plan and return it as a JSON document; raises UserError for what will not fit."""
    settings = settle(PlanSettings, config)
    lengths_only = settings.context_tokens is not None
    if lengths_only and (arguments.document is not None or arguments.query is not None):
        raise UserError(
            "a plan is for a document or for a number of tokens",
            given=f"-d or -q with context_tokens={settings.context_tokens}",
            allowed="one of them",
            remedy="Leave context_tokens out, or -d and -q.",
        )
    texts = None if lengths_only else read(arguments, settings.needle_depth)
    setup = make_setup(settings, display, settings.decode)
    if texts is None:
        prompt = _blank_prompt(setup, settings)
    else:
        prompt = setup.prompt(*texts, chat=settings.chat, question_first=settings.question_first)
    answer = settings.decode.answer
    setup = setup.covering(len(prompt.token_ids) + answer.new_tokens)
    setup, plan = in_chunks(setup, setup.plan(prompt, answer.new_tokens), settings, display)
    _show(plan, answer, setup, settings, display)
    schedules = None
    if settings.burst.explain:
        schedules = explain(plan, settings.burst, setup.spec.device, display)
    room = check_fits(setup, plan, settings)
    _show_room(plan, answer, room, display)
    return {
        "model": settings.model,
        "model_path": setup.spec.model_path,
        "strategy": plan.strategy,
        "compressor": plan.compressor,
        "cluster": settings.cluster.name,
        "hosts": plan.hosts,
        "dtype": setup.spec.dtype,
        "context_tokens": plan.lengths.context,
        "query_tokens": plan.lengths.query,
        "max_new_tokens": answer.new_tokens,
        "memory_available_bytes": room.available,
        "fits": room.available is not None or None,
        "plan": plan_document(plan, answer),
        "burst": schedules,
        "versions": versions(),
    }


def _blank_prompt(setup: Setup, settings: PlanSettings) -> Prompt:
    """A prompt of the asked lengths, with the head, separator and tail that the template would add."""
    if setup.tokenizer is None:  # random weights have no template and no text to separate
        like, between = Prompt((0,), 0, Question((), (0,), (), None)), 0
    else:
        like = make_prompt(setup.tokenizer, "a", "a", chat=settings.chat)
        between = len(separator(setup.tokenizer))
    assert like.question is not None and settings.context_tokens is not None
    before, after = like.question.before, like.question.after
    own = settings.query_tokens - len(before) - len(after)
    copied = own + between if settings.question_first else 0
    # Before as many tokens are made as somebody asks for.
    asked, new = settings.context_tokens + settings.query_tokens, settings.decode.max_new_tokens
    setup.covering(asked + new).check_room(asked, new)
    for key, given, least in (
        ("context_tokens", settings.context_tokens, like.head + copied + 1),
        ("query_tokens", settings.query_tokens, len(before) + len(after) + 1),
    ):
        if given < least:
            raise UserError(
                f"{key} leaves no room beside the chat template's own tokens",
                given=f"{key}={given}",
                allowed=f"{least} or more",
                remedy=f"Raise {key}.",
            )
    return Prompt((0,) * settings.context_tokens, like.head, Question(before, (0,) * own, after, None), copied=copied)


def _show(plan: PrefillPlan, answer: Generation, setup: Setup, settings: PlanSettings, display: Display) -> None:
    lengths = plan.lengths
    display.note(
        f"{settings.model}, {setup.spec.dtype} on {setup.spec.device}: {lengths.context:,} context tokens, "
        f"{lengths.query:,} query tokens, up to {answer.new_tokens:,} new ones; "
        f"the model takes {plan.shape.max_positions:,}."
    )
    passing = plan.spread is None  # the others pass rows on, or could
    columns = ["host", "positions", *(["anchor", "passed in", "passes on"] if passing else [])]
    columns += ["prefill", "sends", "weights", "KV", "activations"]
    rows = [
        [
            str(row["host"]),
            ", ".join(f"{start:,}-{stop - 1:,}" for start, stop in row["spans"]),
            *(f"{row[key]:,}" for key in ("anchor_tokens", "passing_rows", "kept_rows") if passing),
            flops(row["prefill_flops"]),
            size(row["passing_bytes"] + row["query_bytes"]),
            size(row["memory"]["weights"]),
            size(row["memory"]["kv"]),
            size(row["memory"]["activations"]),
        ]
        for row in host_rows(plan, answer)
    ]
    scorer = f", compressor {plan.compressor}" if plan.compressor else ""
    exact = "exact" if plan.exact else "approximate"
    display.table(f"strategy {plan.strategy}{scorer}: {exact}", columns, rows)
    if passing:
        display.note("anchor, passed in, passes on: tokens (the latter two per layer and kv head)", style="dim")
    _show_kinds(plan, answer, display)
    _compare(plan, setup, display)


def _show_kinds(plan: PrefillPlan, answer: Generation, display: Display) -> None:
    """Say what layers of each kind hold and send, where there are several kinds."""
    if len(plan.shape.kinds) == 1:
        return
    rows = []
    for name, most in _most_by_kind(plan, answer).items():
        rows.append([name, f"{most['layers']:,}", *(size(most[key]) for key in ("kept", "exchanged", "mixed"))])
    display.table("The most of any host, by kind of layer", ["kind", "layers", "keeps", "exchanges", "mixes"], rows)
    display.note("keeps: all layers; exchanges, mixes: buffers, and tokens under way, of one layer", style="dim")


def _most_by_kind(plan: PrefillPlan, answer: Generation) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for rank in range(plan.hosts):
        for name, each in memory_by_kind(plan, rank, answer).items():
            held = found.setdefault(name, dict.fromkeys(each, 0))
            held.update({key: max(held[key], count) for key, count in each.items()})
    return found


def _compare(plan: PrefillPlan, setup: Setup, display: Display) -> None:
    """Set the busiest host against full attention over the same lengths."""
    total = sum(bytes_by_kind(plan, plan.lengths.query).values())
    display.note(f"All hosts send {size(total)} for prefill and question.")
    if plan.hosts == 1:
        return
    full = setup.using("full", hosts=1).strategy.plan(plan.lengths, 1, plan.shape)
    busiest = critical_flops(plan)
    display.note(
        f"Full attention on one host: {flops(prefill_flops(full, 0))}, "
        f"{prefill_flops(full, 0) / busiest:.1f} times what the busiest host computes here."
    )


def _show_room(plan: PrefillPlan, answer: Generation, room: Room, display: Display) -> None:
    if room.available is None:
        display.note("Memory is not checked: the hosts may stand on other machines (set memory_gb).")
        return
    need = needed_bytes(plan, answer, sharing=room.sharing, copies=room.copies)
    display.note(f"It fits: {size(need)} of {size(room.available)} free on {room.where}.", style="green")
