"""Tensors of one rank's run of a schedule: the caller's, the working ones, and the memory of its slots.

Shapes: B batch, H query heads, K kv heads, S rows of a block, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from burst.execution.buffers import Field, Form, pack, scratch_of, size, views
from burst.execution.heads import HeadSplit
from burst.kernels.base import row_sums
from burst.schedules.base import Schedule
from burst.schedules.payload import Role
from burst.schedules.steps import BORDER, Parcel, Slot
from burst.transport import Transport


class SlotMemory:
    """The content of each slot of one rank.

    ``caller`` has the rank's own rows of all heads, ``working`` the rows and heads that it works on. They differ in
    head groups only. ``written`` are the slots of index 0 that hold a sum.
    """

    def __init__(self, schedule: Schedule, transport: Transport, form: Form, own: Mapping[str, Tensor]) -> None:
        self.schedule, self.transport, self.form = schedule, transport, form
        self.rank, self.block = transport.rank, schedule.block_of(transport.rank)
        self.heads = schedule.heads_of(transport.rank)
        self.split = HeadSplit(schedule, transport.rank, transport.device) if schedule.heads else None
        self.caller, self.working = dict(own), dict(own)
        self.written: set[Slot] = set()
        self._flat: dict[Slot, Tensor] = {}
        self._taken: list[Tensor] = []
        self._held = schedule.slot_blocks(transport.rank)

    def delta(self) -> Tensor:
        """Return the row sums of dout * out (B, H, S) of the rows and heads that this rank works on."""
        if "delta" not in self.working:
            self.working["delta"] = row_sums(self.working["dout"], self.working["out"])
        return self.working["delta"]

    def results(self) -> dict[str, Tensor]:
        """Return the rank's result before the last exchange. A gradient without any sum is 0."""
        if self.schedule.phase == "forward":
            return {"out": self.working["out"]}
        for slot in (Slot("dq", 0), Slot("dkv", 0)):
            if slot not in self.written:
                self._buffer(slot).zero_()
                self.written.add(slot)
        return self.tensors(Slot("dq", 0), self.block) | self.tensors(Slot("dkv", 0), self.block)

    def content(self, parcel: Parcel) -> Tensor:
        """Return the message to send: a buffer as it is, or own tensors, packed once and kept for later sends."""
        role, fields = parcel.slot.role, self._fields(parcel)
        if parcel.heads is not None:
            assert self.split is not None
            if role in ("out", "dqkv"):
                tensors = self.split.rows_of(self.results(), parcel.block)
            else:
                tensors = self.split.heads_of(self.caller, parcel.heads)
            return pack(self._take(size(fields)), fields, tensors)
        if parcel.slot.index == 0 and role not in ("dq", "dkv") and parcel.slot not in self._flat:
            self._flat[parcel.slot] = self._take(size(fields))
            pack(self._flat[parcel.slot], fields, self.tensors(parcel.slot, parcel.block))
        return self._buffer(parcel.slot)[: size(fields)]

    def space(self, parcel: Parcel) -> Tensor:
        """Return the memory that a received message fills."""
        return self._buffer(parcel.slot)[: size(self._fields(parcel))]

    def tensors(self, slot: Slot, block: int) -> dict[str, Tensor]:
        """Return a slot's tensors for the block that it holds now; an input's slot 0 is the caller's."""
        if slot.index == 0 and slot.role in ("kv", "q"):
            return {name: self.working[name] for name in (("q",) if slot.role == "q" else ("k", "v"))}
        if slot == Slot("qd", 0):
            self.delta()
            return {name: self.working[name] for name in ("q", "dout", "lse", "delta", "out")}
        return views(self._buffer(slot), self.form.fields(slot.role, self.schedule.rows(slot.role, block), self.heads))

    def arrived(self, role: Role, slots: Sequence[Slot | None]) -> list[dict[str, Tensor] | None]:
        """Return the tensors that came from each member of the head group; None: nothing, or the rank itself."""
        return [
            None if slot is None or slot.index == 0 else views(self._buffer(slot), self._border(role, m))
            for m, slot in enumerate(slots)
        ]

    def release(self) -> None:
        """Give the workspace back to the next call. Nobody may hold a view of it any more."""
        scratch_of(self.transport).give(self._taken)

    def _buffer(self, slot: Slot) -> Tensor:
        """Return a slot's memory, uint8 (bytes,), made on first use."""
        if slot not in self._flat:
            if slot.role in BORDER:
                n = max(size(self._border(slot.role, m)) for m in range(self.schedule.members))
            else:
                rows = max(self.schedule.rows(slot.role, block) for block in self._held.get(slot, (self.block,)))
                n = size(self.form.fields(slot.role, rows, self.heads))
            # What slot 0 holds is handed to the caller.
            lasting, device = slot.index == 0, self.transport.device
            self._flat[slot] = torch.empty(n, dtype=torch.uint8, device=device) if lasting else self._take(n)
        return self._flat[slot]

    def _take(self, n: int) -> Tensor:
        self._taken.append(scratch_of(self.transport).take(n, self.transport.device))
        return self._taken[-1]

    def _fields(self, parcel: Parcel) -> Mapping[str, Field]:
        rows = self.schedule.rows(parcel.slot.role, parcel.block)
        heads = self.heads if parcel.heads is None else self.schedule.heads[parcel.heads]
        return self.form.fields(parcel.slot.role, rows, heads)

    def _border(self, role: Role, member: int) -> Mapping[str, Field]:
        """Return the fields of a member's message: its rows and my heads, or my rows and its heads."""
        first = self.rank - self.rank % self.schedule.members
        towards_heads = role in ("qkv", "dout")
        rows = self.schedule.layout.counts[first + member if towards_heads else self.rank]
        return self.form.fields(role, rows, self.heads if towards_heads else self.schedule.heads[member])
