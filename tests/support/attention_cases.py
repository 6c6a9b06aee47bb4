"""Cases of distributed attention against dense attention in fp64: outputs, gradients, bytes and messages.

Shapes: B batch, H query heads, K kv heads, N tokens, D head dim, E value dim.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from burst.execution.attend import attention
from burst.layouts.layout import NAMES as LAYOUTS
from burst.layouts.layout import layout
from burst.schedules import NAMES as SCHEDULES
from burst.schedules import AttentionShape, Phase, schedule
from burst.transport import Transport, VirtualWorld

OUT_ATOL, GRAD_ATOL = 1e-12, 1e-11  # fp64
LENGTHS = (1, 2, 7, 15, 17, 256, 1050, 2999)
PACKED = ((0, 7, 14, 16), (0, 120, 1248, 4232))
HEADS = ((4, 4), (8, 2), (4, 1))  # MHA, GQA 4, MQA
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"causal": False}, {"window": 9}, {"sinks": True})


@dataclass(frozen=True)
class Case:
    """One call: who holds what, how it travels, and what is computed."""

    world: int
    layout: str = "zigzag"
    schedule: str = "ring"
    backward: str = "kv"
    heads: tuple[int, int] = (4, 4)
    edges: tuple[int, ...] = (0, 64)  # of the documents; the last one is N
    causal: bool = True
    window: int | None = None
    sinks: bool = False
    soft_cap: float | None = None
    scale: float | None = None
    dim: int = 8
    value_dim: int = 8
    batch: int = 1
    checkpoint: float | None = None
    per_node: int | None = None  # ranks; None: all on one node
    dtype: torch.dtype = torch.float64
    accurate: bool = False

    @property
    def key(self) -> str:
        """Name the case by what differs from the default."""
        base = Case(self.world)
        parts = [
            f"P{self.world}",
            self.layout,
            self.schedule,
            self.backward,
            f"{self.heads[0]}over{self.heads[1]}",
        ]
        parts.append("+".join(map(str, self.edges)))
        rest = ("causal", "window", "sinks", "soft_cap", "scale", "dim", "value_dim", "batch", "checkpoint", "per_node")
        parts += [f"{n}={getattr(self, n)}" for n in rest if getattr(self, n) != getattr(base, n)]
        return "/".join(parts)

    @property
    def nodes(self) -> tuple[int, ...]:
        """The node of each rank."""
        return tuple(r // (self.per_node or self.world) for r in range(self.world))

    def shape(self) -> AttentionShape:
        """Return what bytes are counted with."""
        size, state = self.dtype.itemsize, 8 if self.dtype == torch.float64 else 4
        return AttentionShape(
            *self.heads,
            self.dim,
            self.value_dim,
            self.batch,
            size,
            state,
            state,
            state if self.accurate else size,
        )


def matrix(worlds: tuple[int, ...] = tuple(range(1, 9))) -> Iterator[Case]:
    """Yield every world, layout, schedule, traveller and kind of heads over every length and packing.

    Up to 256 tokens under every option; beyond, options are for MQA alone, because the oracle takes minutes.
    """
    for edges in (*((0, n) for n in LENGTHS), *PACKED):
        for heads in HEADS:
            for options in OPTIONS:
                if edges[-1] <= 256 or not options or heads == HEADS[-1]:
                    for world in worlds:
                        yield from _ways(Case(world, heads=heads, edges=edges, **options))


def _ways(base: Case) -> Iterator[Case]:
    per_node = base.world // 2 if base.world % 2 == 0 and base.world > 2 else None
    for name in LAYOUTS:
        for way in SCHEDULES:
            nodes = per_node if way in ("burst", "double_ring", "usp") else None
            # Nothing but keys and values can travel in an all-gather, and nothing does in a pure exchange
            # of heads.
            for backward in ("kv",) if way in ("allgather", "ulysses") else ("kv", "q"):
                yield replace(base, layout=name, schedule=way, backward=backward, per_node=nodes)


@lru_cache(maxsize=4)
def inputs(heads: tuple[int, int], n: int, dim: int, value_dim: int, batch: int) -> tuple[Tensor, ...]:
    """Return q, k, v, dout and sinks, normal numbers in fp64 that fp32 and bf16 hold without rounding."""
    gen = torch.Generator().manual_seed(n + 17 * heads[0] + heads[1])
    shapes = [(heads[0], n, dim), (heads[1], n, dim), (heads[1], n, value_dim), (heads[0], n, value_dim)]
    drawn = [torch.randn(batch, *s, generator=gen).bfloat16().double() for s in shapes]
    return (*drawn, torch.randn(heads[0], generator=gen).bfloat16().double())


def dense(case: Case) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv and dsinks of one softmax over the whole sequence, in fp64."""
    return _dense(
        case.heads,
        case.edges,
        case.causal,
        case.window,
        case.sinks,
        case.soft_cap,
        case.scale,
        case.dim,
        case.value_dim,
        case.batch,
    )


@lru_cache(maxsize=4)
def _dense(
    heads: tuple[int, int],
    edges: tuple[int, ...],
    causal: bool,
    window: int | None,
    with_sinks: bool,
    soft_cap: float | None,
    scale: float | None,
    dim: int,
    value_dim: int,
    batch: int,
) -> tuple[Tensor, ...]:
    q, k, v, dout, sinks = inputs(heads, edges[-1], dim, value_dim, batch)
    out = torch.zeros_like(dout)
    grads = [torch.zeros_like(x) for x in (q, k, v, sinks)]
    group = heads[0] // heads[1]
    hidden_NN = ~_visible(edges, causal, window)
    for head in range(heads[0]):  # one at a time: several N x N matrices are alive
        own = slice(head, head + 1), slice(head // group, head // group + 1)
        leaves = [x.clone().requires_grad_() for x in (q[:, own[0]], k[:, own[1]], v[:, own[1]], sinks[own[0]])]
        scores = leaves[0] @ leaves[1].mT * (dim**-0.5 if scale is None else scale)
        scores = scores if soft_cap is None else soft_cap * (scores / soft_cap).tanh()
        scores = scores.masked_fill(hidden_NN, -math.inf)
        sink = leaves[3].expand(*scores.shape[:3], 1) if with_sinks else scores.new_full((1,), -math.inf)
        weights = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
        result = weights @ leaves[2]
        out[:, own[0]] = result.detach()
        for total, span, grad in zip(
            grads,
            (own[0], own[1], own[1], own[0]),
            torch.autograd.grad(result, leaves, dout[:, own[0]], allow_unused=True),
            strict=True,
        ):
            if grad is not None:
                (total[span] if total.dim() == 1 else total[:, span]).add_(grad)
    return (out, *grads)


def _visible(edges: tuple[int, ...], causal: bool, window: int | None) -> Tensor:
    positions = torch.arange(edges[-1])
    document = torch.searchsorted(torch.tensor(edges[1:]), positions, right=True)
    gap_NN = positions[:, None] - positions[None]
    seen_NN = document[:, None] == document[None]
    if causal:
        seen_NN &= gap_NN >= 0
    return seen_NN if window is None else seen_NN & (gap_NN.abs() < window)


def compute(case: Case, world: VirtualWorld | None = None) -> tuple[tuple[Tensor, ...], VirtualWorld]:
    """Run the case on virtual ranks; return out, dq, dk, dv in sequence order and dsinks, and the world."""
    drawn = inputs(case.heads, case.edges[-1], case.dim, case.value_dim, case.batch)
    where = layout(case.layout, case.edges[-1], case.world, case.edges)

    def rank(t: Transport) -> list[Tensor]:
        q, k, v = (where.shard(x.to(case.dtype), t.rank, 2).requires_grad_() for x in drawn[:3])
        sinks = drawn[4].clone().requires_grad_() if case.sinks else None
        out = attention(
            q,
            k,
            v,
            transport=t,
            layout=where,
            schedule=case.schedule,
            backward=case.backward,
            causal=case.causal,
            window=case.window,
            sinks=sinks,
            soft_cap=case.soft_cap,
            scale=case.scale,
            checkpoint=case.checkpoint,
            accurate=case.accurate,
        )
        assert isinstance(out, Tensor)
        out.backward(where.shard(drawn[3].to(case.dtype), t.rank, 2))
        leaves = [q, k, v] if sinks is None else [q, k, v, sinks]
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]

    world = world or VirtualWorld(case.world, nodes=case.nodes)
    results = world.run(rank)
    whole = [where.unshard([r[i] for r in results], 2) for i in range(4)]
    dsinks = sum(r[4] for r in results) if case.sinks else torch.zeros(case.heads[0])
    assert isinstance(dsinks, Tensor)
    return (*whole, dsinks), world


def booked(case: Case, world: VirtualWorld) -> tuple[bool, bool]:
    """Say whether bytes and messages of one forward and backward are those that the schedules count."""
    where = layout(case.layout, case.edges[-1], case.world, case.edges)
    same_bytes = same_messages = True
    for t in world.transports:
        sent: Counter[tuple[str, str]] = Counter()
        messages: Counter[str] = Counter()
        phases: tuple[tuple[Phase, str], ...] = (
            ("forward", "auto"),
            ("backward", {"kv": "kv", "q": "qd"}.get(case.backward, "auto")),
        )
        for phase, travels in phases:
            plan = schedule(
                case.schedule,
                where,
                case.shape(),
                phase=phase,
                nodes=case.nodes,
                causal=case.causal,
                window=case.window,
                travels=travels,
            )
            sent.update(plan.bytes_sent(t.rank, case.shape()))
            messages.update(p.slot.role for p in plan.sends(t.rank))
        booked_bytes = {key: n for key, n in t.ledger.entries().items() if key[0] != "agree"}
        booked_messages = {key: n for key, n in t.ledger.messages().items() if key != "agree"}
        same_bytes &= booked_bytes == {key: n for key, n in sent.items() if n}
        same_messages &= booked_messages == dict(messages)
    return same_bytes, same_messages


def run(case: Case) -> dict[str, Any]:
    """Run one case and compare: ``ok`` when errors, bytes and messages all hold."""
    got, world = compute(case)
    errors = [(x - y).abs().max().item() for x, y in zip(got, dense(case), strict=True)]
    same_bytes, same_messages = (True, True) if case.checkpoint is not None else booked(case, world)
    ok = errors[0] <= OUT_ATOL and max(errors[1:]) <= GRAD_ATOL and same_bytes and same_messages
    return {
        "ok": ok,
        "out_error": errors[0],
        "grad_error": max(errors[1:]),
        "bytes": same_bytes,
        "messages": same_messages,
    }
