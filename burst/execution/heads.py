"""Copies between a rank's own rows of all heads and a head group's rows of a few heads.

Shapes: B batch, h heads of one member, S own rows, W rows of the group, D head or value dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from burst.execution.buffers import Form
from burst.schedules.base import Schedule
from burst.schedules.payload import Heads, Role
from burst.transport import Message, Transport

Arrived = Sequence[Mapping[str, Tensor] | None]  # by member: its tensors; None: nothing, or the rank itself

ROWS = {"qkv": ("q", "k", "v"), "dout": ("dout",), "out": ("out",), "dqkv": ("dq", "dk", "dv")}
OF_KEYS = ("k", "v", "dk", "dv")  # tensors with kv heads; all others have query heads
TOKENS = 2


class HeadSplit:
    """One rank's part in its head group. Source: DeepSpeed-Ulysses; heads dealt unevenly are ours."""

    def __init__(self, schedule: Schedule, rank: int, device: torch.device) -> None:
        self._schedule, self._rank = schedule, rank
        self._first = rank - rank % schedule.members
        self._places = schedule.places(rank, device)

    def heads_of(self, own: Mapping[str, Tensor], member: int) -> dict[str, Tensor]:
        """Return a member's heads of all own tensors: views (B, h, S, D)."""
        heads = self._schedule.heads[member]
        return {name: x[:, _span(name, heads)] for name, x in own.items()}

    def rows_of(self, results: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """Return a rank's rows of the group's tensors: copies (B, h, S, D)."""
        place = self._places[rank - self._first]
        return {name: x.index_select(TOKENS, place) for name, x in results.items()}

    def gather(self, own: Mapping[str, Tensor], arrived: Arrived, role: Role) -> dict[str, Tensor]:
        """Put all members' rows of this rank's heads together: (B, h, W, D) each, in the group's order."""
        me = self._rank - self._first
        mine = self.heads_of({name: own[name] for name in ROWS[role]}, me)
        rows = self._schedule.blocks.counts[self._schedule.block_of(self._rank)]
        out = {name: x.new_empty((*x.shape[:TOKENS], rows, x.shape[3])) for name, x in mine.items()}
        for m, part in enumerate(arrived):
            for name, x in (mine if m == me else part or {}).items():
                out[name].index_copy_(TOKENS, self._places[m], x)
        return out

    def scatter(self, results: Mapping[str, Tensor], arrived: Arrived, role: Role, form: Form) -> dict[str, Tensor]:
        """Put the heads of this rank's rows together again: (B, H or K, S, D) each.

        A kv head that several members worked on gets the sum of their gradients, in member order.
        """
        me = self._rank - self._first
        mine = self.rows_of(results, self._rank)
        fields = form.fields(role, self._schedule.layout.counts[self._rank], None)
        out = {}
        for name in ROWS[role]:
            shape, dtype = fields[name]
            whole = torch.zeros(shape, dtype=dtype if role == "out" else form.acc, device=mine[name].device)
            for m, heads in enumerate(self._schedule.heads):
                part = mine if m == me else arrived[m]
                if part is not None:
                    whole[:, _span(name, heads)] += part[name]
            out[name] = whole
        return out

    def own_lse(self, lse: Tensor, transport: Transport, form: Form) -> Tensor:
        """Return the lse of all heads of this rank's rows, (B, H, S), from (B, h, W) on every member.

        Not part of a schedule: only callers that want the lse pay for it (kind ``lse``).
        """
        members, counts = self._schedule.members, self._schedule.layout.counts
        whole = lse.new_empty((form.batch, form.q_heads, counts[self._rank]))
        sends, recvs, mine = [], [], self._schedule.heads[self._rank - self._first]
        parts: list[tuple[Heads, Tensor]] = []
        for m in range(members):
            peer, heads = self._first + m, self._schedule.heads[m]
            rows = self.rows_of({"lse": lse}, peer)["lse"]
            if peer == self._rank:
                parts.append((mine, rows))
                continue
            into = lse.new_empty((form.batch, heads.q_count, counts[self._rank]))
            parts.append((heads, into))
            sends.append(Message(peer, rows.contiguous()))
            recvs.append(Message(peer, into))
        step = f"attention {self._schedule.name} forward lse"
        transport.exchange(sends, recvs, kind="lse", step=step, channel="heads-lse").wait()
        for heads, part in parts:
            whole[:, heads.q_start : heads.q_stop] = part
        return whole


def _span(name: str, heads: Heads) -> slice:
    if name in OF_KEYS:
        return slice(heads.kv_start, heads.kv_stop)
    return slice(heads.q_start, heads.q_stop)
