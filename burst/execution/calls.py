"""From the arguments of one attention call to what is run: checked sizes, schedules, the ranks' agreement.

Shapes: B batch, H query heads, K kv heads, S own queries, T own keys, D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from burst.errors import UserError, choose
from burst.execution.blocks import Blocks
from burst.execution.buffers import Form
from burst.kernels import kernel
from burst.kernels.base import check_inputs, refuse
from burst.layouts.layout import Layout
from burst.layouts.masks import Span
from burst.planner.planner import plan
from burst.planner.topology import Topology, topology
from burst.schedules import Phase, Schedule, schedule
from burst.transport import Transport

FORWARD = ("auto", "kv", "q")
BACKWARD = {"auto": "auto", "kv": "kv", "q": "qd"}  # what the caller says -> role of the traveller


@dataclass(frozen=True)
class AttentionOptions:
    """The arguments of ``burst.attention`` that must be the same on every rank."""

    schedule: str | Schedule
    causal: bool
    scale: float | None
    window: int | None
    keys: Layout | None
    forward: str
    backward: str
    ulysses: int | None
    topology: Topology | None
    accurate: bool
    checkpoint: float | None
    kernel: str
    return_lse: bool


@dataclass(frozen=True)
class AttentionCall:
    """One call on one rank. ``backward`` is None where no gradient is wanted.

    ``again`` is the forward of the first tokens, whose outputs are not kept; ``dropped`` and ``kept`` are the
    rows, int64, of the first and of the other tokens among those that this rank works on.
    """

    transport: Transport
    form: Form
    blocks: Blocks
    forward: Schedule
    backward: Schedule | None = None
    again: Schedule | None = None
    dropped: Tensor | None = None
    kept: Tensor | None = None


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    transport: Transport,
    layout: Layout,
    options: AttentionOptions,
) -> AttentionCall:
    """Check the arguments, make the schedules and let the ranks agree on them; see ``burst.attention``."""
    check_inputs("attention", q, k, v, options.scale)
    form = _form(q, k, v, options.accurate)
    _check(q, k, sinks, transport, layout, options)
    blocks = Blocks(
        kernel(options.kernel, q.device, form.acc if options.accurate else form.dtype),
        form.head_dim**-0.5 if options.scale is None else options.scale,
        options.accurate,
    )
    leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    if options.schedule == "auto":
        options = _planned(layout, form, transport, options, wants_gradient)
    call = AttentionCall(transport, form, blocks, _forward(layout, options.keys, form, transport, options))
    if wants_gradient:
        call = _with_backward(call, layout, options)
    _agree(call, sinks, options.return_lse)
    return call


def _forward(
    layout: Layout, keys: Layout | None, form: Form, transport: Transport, options: AttentionOptions
) -> Schedule:
    given = options.schedule
    if isinstance(given, Schedule):
        _check_made_for(given, layout, form, transport, options)
        return given
    return schedule(
        given,
        layout,
        form.shape(),
        nodes=transport.nodes,
        causal=options.causal,
        window=options.window,
        keys=keys,
        travels=options.forward,
        ulysses=options.ulysses,
    )


def _check_made_for(
    made: Schedule, layout: Layout, form: Form, transport: Transport, options: AttentionOptions
) -> None:
    """Raise UserError unless a schedule that the caller made was made for this call."""
    shape, heads = made.shape, made.heads  # a schedule of head groups has the layout's keys
    facts: list[tuple[str, object, object]] = [
        ("phase", made.phase, "forward"),
        ("query heads", shape.q_heads, form.q_heads),
        ("kv heads", shape.kv_heads, form.kv_heads),
        ("head dim", shape.head_dim, form.head_dim),
        ("value dim", shape.value_dim, form.value_dim),
        ("layout", made.layout, layout),
        ("keys", made.layout if heads else made.key_blocks, options.keys or layout),
        ("nodes", made.nodes, transport.nodes),
        ("causal", made.causal, options.causal),
        ("window", made.window, options.window),
        ("traveller", made.travels, made.travels if options.forward == "auto" else options.forward),
    ]
    others = [fact for fact in facts if fact[1] != fact[2]]
    if others:
        raise UserError(
            "the schedule was made for another call",
            given=f"{made.name}: " + ", ".join(f"{what} {theirs}" for what, theirs, _ in others),
            allowed=", ".join(f"{what} {ours}" for what, _, ours in others),
            remedy="Make it with the call's arguments, or pass its name.",
        )


def _planned(
    layout: Layout, form: Form, transport: Transport, options: AttentionOptions, wants_gradient: bool
) -> AttentionOptions:
    """Put the planner's choice in the place of ``auto``: by the arguments alone, so ranks choose alike."""
    where = options.topology or topology(
        transport.world, transport.nodes, "cuda" if transport.device.type == "cuda" else "cpu"
    )
    best = plan(
        layout,
        form.shape(),
        where,
        causal=options.causal,
        window=options.window,
        keys=options.keys,
        backward=wants_gradient,
        travels=(options.forward, BACKWARD[options.backward]),
    ).chosen
    return replace(options, schedule=best.name, ulysses=best.ulysses)


def _with_backward(call: AttentionCall, layout: Layout, options: AttentionOptions) -> AttentionCall:
    going, form = call.forward, call.form

    def like(where: Layout, phase: Phase, travels: str) -> Schedule:
        return schedule(
            going.name,
            where,
            form.shape(),
            phase=phase,
            nodes=going.nodes,
            causal=going.causal,
            window=going.window,
            keys=options.keys,
            travels=travels,
            ulysses=going.members if going.name == "usp" else None,
        )

    call = replace(call, backward=like(layout, "backward", BACKWARD[options.backward]))
    kept = 1.0 if options.checkpoint is None else options.checkpoint
    edge = layout.n_tokens - round(kept * layout.n_tokens)
    if edge == 0:
        return call
    again = like(first_tokens(layout, edge), "forward", going.travels)
    first = going.blocks.positions(going.block_of(call.transport.rank)) < edge
    dropped, kept_rows = (rows.nonzero().squeeze(1).to(call.transport.device) for rows in (first, ~first))
    return replace(call, again=again, dropped=dropped, kept=kept_rows)


def first_tokens(layout: Layout, stop: int) -> Layout:
    """Return the layout of the tokens before position ``stop``; every rank keeps the first of its rows."""

    def cut(span: Span) -> Span | None:
        count = min(span.count, -((span.start - stop) // span.step))
        return replace(span, count=count) if count > 0 else None

    spans = tuple(tuple(s for s in map(cut, row) if s is not None) for row in layout.spans)
    return replace(layout, n_tokens=stop, cu_seqlens=tuple(min(edge, stop) for edge in layout.cu_seqlens), spans=spans)


def _agree(call: AttentionCall, sinks: Tensor | None, return_lse: bool) -> None:
    """Let the ranks compare what they are about to do, before the first message of this kind of call."""
    schedules = [s for s in (call.forward, call.backward, call.again) if s is not None]
    options = f"{call.form}, scale {call.blocks.scale!r}, sinks {sinks is not None}, return_lse {return_lse}"
    text = f"{[s.digest for s in schedules]} {options}"
    call.transport.agree_once(text, step="attention agree", here=f"{call.forward.name}, {options}")
    call.transport.open(sorted({channel for s in schedules for channel in s.channels}))


def _form(q: Tensor, k: Tensor, v: Tensor, accurate: bool) -> Form:
    if q.shape[1] == 0 or v.shape[3] == 0:
        given = f"{q.shape[1]} query heads, value dim {v.shape[3]}"
        _refuse("there is nothing to attend with", given, "1 or more", "Check the projections.")
    return Form(q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype, accurate)


def _check(
    q: Tensor, k: Tensor, sinks: Tensor | None, transport: Transport, layout: Layout, options: AttentionOptions
) -> None:
    keys, rank = options.keys or layout, transport.rank
    choose("forward", options.forward, FORWARD)
    choose("backward", options.backward, BACKWARD)
    if layout.world != transport.world:
        remedy = "Make the layout for the transport's world."
        _refuse("layout and transport differ in their ranks", layout.world, transport.world, remedy)
    for name, x, counts in (("q", q, layout.counts), ("k and v", k, keys.counts)):
        if x.shape[2] != counts[rank]:
            remedy = "Shard with layout.shard(x, rank, dim=2), or project sharded rows."
            _refuse(
                f"{name} must hold rank {rank}'s rows",
                f"{x.shape[2]} tokens",
                f"{counts[rank]} tokens",
                remedy,
            )
    if q.device.type != transport.device.type:
        _refuse("tensors and transport differ in their device", q.device, transport.device, "Move the tensors.")
    if options.ulysses is not None and options.schedule != "usp":
        _refuse("only usp has head groups", f"ulysses {options.ulysses}", "None", "Set schedule='usp', or no ulysses.")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        _refuse("sinks must hold one logit a head", tuple(sinks.shape), (q.shape[1],), "Pass (H,).")
    if options.checkpoint is not None:
        if not 0 <= options.checkpoint <= 1:
            _refuse("checkpoint is a fraction", options.checkpoint, "0 to 1", "Give the share to keep.")
        if not options.causal or options.keys is not None:
            remedy = "Leave checkpoint None."
            _refuse("checkpoint needs a causal call without history", "another", "causal, no keys", remedy)


def _refuse(message: str, given: object, allowed: object, remedy: str) -> NoReturn:
    refuse("attention", message, given, allowed, remedy)
