"""Arguments of ``burst.attention`` and their checks.

Shapes: B batch, H query heads, K kv heads, S own queries, D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from burst.errors import UserError, choose
from burst.execution.buffers import Form
from burst.kernels.base import check_inputs, reject
from burst.kernels.soft_cap import check_cap
from burst.layouts.layout import Layout
from burst.planner.topology import Topology
from burst.schedules import Schedule
from burst.transport import Transport

FORWARD = ("auto", "kv", "q")
BACKWARD = {"auto": "auto", "kv": "kv", "q": "qd"}  # what the caller says -> role of the traveller

_reject = partial(reject, "attention")


@dataclass(frozen=True)
class AttentionOptions:
    """The arguments of ``burst.attention`` that must be the same on every rank."""

    layout: Layout
    schedule: str | Schedule
    causal: bool
    scale: float | None
    window: int | None
    soft_cap: float | None
    keys: Layout | None
    forward: str
    backward: str
    ulysses: int | None
    topology: Topology | None
    accurate: bool
    checkpoint: float | None
    kernel: str
    return_lse: bool


def check_call(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, transport: Transport, options: AttentionOptions
) -> Form:
    """Return the sizes and types of a call; raises UserError for what does not fit together on this rank."""
    check_inputs("attention", q, k, v, options.scale)
    if q.shape[1] == 0 or v.shape[3] == 0:
        given = f"{q.shape[1]} query heads, value dim {v.shape[3]}"
        _reject("there is nothing to attend with", given, "1 or more", "Check the projections.")
    if options.soft_cap is not None:
        check_cap("attention", options.soft_cap)
    choose("forward", options.forward, FORWARD)
    choose("backward", options.backward, BACKWARD)
    layout, rank = options.layout, transport.rank
    if layout.world != transport.world:
        remedy = "Make the layout for the transport's world."
        _reject("layout and transport differ in their ranks", layout.world, transport.world, remedy)
    for name, x, held in (("q", q, layout.counts[rank]), ("k and v", k, (options.keys or layout).counts[rank])):
        if x.shape[2] != held:
            remedy = "Shard with layout.shard(x, rank, dim=2), or project sharded rows."
            _reject(f"{name} must hold rank {rank}'s rows", f"{x.shape[2]} tokens", f"{held} tokens", remedy)
    if q.device.type != transport.device.type:
        _reject("tensors and transport differ in their device", q.device, transport.device, "Move the tensors.")
    if options.ulysses is not None and options.schedule != "usp":
        _reject("only usp has head groups", f"ulysses {options.ulysses}", "None", "Set schedule='usp', or no ulysses.")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        _reject("sinks must hold one logit a head", tuple(sinks.shape), (q.shape[1],), "Pass (H,).")
    if options.checkpoint is not None:
        if not 0 <= options.checkpoint <= 1:
            _reject("checkpoint is a fraction", options.checkpoint, "0 to 1", "Give the share to keep.")
        if not options.causal or options.keys is not None:
            remedy = "Leave checkpoint None."
            _reject("checkpoint needs a causal call without history", "another", "causal, no keys", remedy)
    return Form(q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype, options.accurate)


def check_made_for(made: Schedule, form: Form, transport: Transport, options: AttentionOptions) -> Schedule:
    """Return a schedule that the caller made; raises UserError unless it was made for this call."""
    keys = made.layout if made.heads else made.key_blocks  # a schedule of head groups has the layout's keys
    facts: list[tuple[str, object, object]] = [
        ("phase", made.phase, "forward"),
        ("query heads", made.shape.q_heads, form.q_heads),
        ("kv heads", made.shape.kv_heads, form.kv_heads),
        ("head dim", made.shape.head_dim, form.head_dim),
        ("value dim", made.shape.value_dim, form.value_dim),
        ("widths on the way", made.shape.carried, form.carried),
        ("layout", made.layout, options.layout),
        ("keys", keys, options.keys or options.layout),
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
    return made
