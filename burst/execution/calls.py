"""One attention call on one rank: checked sizes, schedules, the ranks' agreement.

Shapes: B batch, H query heads, K kv heads, S own queries, T own keys, D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from burst.execution.blocks import Blocks
from burst.execution.buffers import Form
from burst.execution.options import BACKWARD, AttentionOptions, check_call, check_made_for
from burst.kernels import capped, kernel
from burst.layouts.layout import Layout
from burst.layouts.masks import Span
from burst.planner.planner import plan
from burst.planner.topology import topology
from burst.schedules import Schedule, schedule
from burst.transport import Transport


@dataclass(frozen=True)
class AttentionCall:
    """One call on one rank. ``backward`` is None where no gradient is wanted.

    ``again`` is the forward of the first tokens, whose outputs are not kept. ``dropped`` and ``kept`` are the rows,
    int64, of the first and of the other tokens among those that this rank works on.
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
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, transport: Transport, options: AttentionOptions
) -> AttentionCall:
    """Check the arguments, make the schedules and let the ranks agree on them; see ``burst.attention``."""
    form = check_call(q, k, v, sinks, transport, options)
    blocks = Blocks(
        capped(kernel(options.kernel, q.device, form.acc if options.accurate else form.dtype), options.soft_cap),
        form.head_dim**-0.5 if options.scale is None else options.scale,
        options.accurate,
    )
    leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    if options.schedule == "auto":
        options = _planned(form, transport, options, wants_gradient)
    call = AttentionCall(transport, form, blocks, _forward(form, transport, options))
    if wants_gradient:
        call = _with_backward(call, options)
    _agree(call, sinks, options)
    return call


def _forward(form: Form, transport: Transport, options: AttentionOptions) -> Schedule:
    made = options.schedule
    if isinstance(made, Schedule):
        return check_made_for(made, form, transport, options)
    return _maker(form, transport, options)(made, travels=options.forward, ulysses=options.ulysses)


def _maker(form: Form, transport: Transport, options: AttentionOptions) -> partial[Schedule]:
    """Return ``schedule`` with everything but the name and the phase's own choices."""
    o, shape, nodes = options, form.shape(), transport.nodes
    return partial(schedule, layout=o.layout, shape=shape, nodes=nodes, causal=o.causal, window=o.window, keys=o.keys)


def _planned(form: Form, transport: Transport, options: AttentionOptions, wants_gradient: bool) -> AttentionOptions:
    """Put the planner's choice in the place of ``auto``: by the arguments alone, so ranks choose alike."""
    machine = "cuda" if transport.device.type == "cuda" else "cpu"
    best = plan(
        options.layout,
        form.shape(),
        options.topology or topology(transport.world, transport.nodes, machine),
        causal=options.causal,
        window=options.window,
        keys=options.keys,
        backward=wants_gradient,
        travels=(options.forward, BACKWARD[options.backward]),
    ).chosen
    return replace(options, schedule=best.name, ulysses=best.ulysses)


def _with_backward(call: AttentionCall, options: AttentionOptions) -> AttentionCall:
    going, layout = call.forward, options.layout
    ulysses = going.members if going.name == "usp" else None
    make = _maker(call.form, call.transport, options)
    backward = make(going.name, phase="backward", travels=BACKWARD[options.backward], ulysses=ulysses)
    call = replace(call, backward=backward)
    kept = 1.0 if options.checkpoint is None else options.checkpoint
    edge = layout.n_tokens - round(kept * layout.n_tokens)
    if edge == 0:
        return call
    again = make(going.name, layout=first_tokens(layout, edge), travels=going.travels, ulysses=ulysses)
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


def _agree(call: AttentionCall, sinks: Tensor | None, given: AttentionOptions) -> None:
    """Let the ranks compare what they are about to do, before the first message of this kind of call."""
    schedules = [s for s in (call.forward, call.backward, call.again) if s is not None]
    options = f"{call.form}, scale {call.blocks.scale!r}, soft cap {given.soft_cap!r}, sinks {sinks is not None}"
    options += f", return_lse {given.return_lse}"
    text = f"{[s.digest for s in schedules]} {options}"
    call.transport.agree_once(text, step="attention agree", here=f"{call.forward.name}, {options}")
    call.transport.open(sorted({channel for s in schedules for channel in s.channels}))
