"""Runs one rank's program: the only place where a schedule meets tensors.

Shapes: B batch, H query heads, K kv heads, S rows of a block, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from burst.execution.blocks import Blocks, add_sinks, begin, sink_gradient
from burst.execution.buffers import Field, Form, pack, scratch_of, size, views
from burst.execution.heads import HeadSplit
from burst.kernels.base import row_sums
from burst.kernels.merge import Accumulator
from burst.schedules.base import Compute, Fold, Parcel, Post, Regroup, Role, Schedule, ScheduleStep, Slot, Wait
from burst.transport import Handle, Message, Transport

Tensors = Mapping[str, Tensor]

BORDER: tuple[Role, ...] = ("qkv", "dout", "out", "dqkv")  # roles of the exchanges between head groups


class Execution:
    """One rank's run of one schedule.

    ``own`` are the rank's tensors by name, rows in the order of ``Schedule.layout``: forward q (B, H, S, D),
    k (B, K, T, D), v (B, K, T, E); backward also lse (B, H, S), out and dout (B, H, S, E). In head groups the
    backward takes all but dout as the forward left them in ``working``; ``resume`` starts a forward there.
    ``label`` begins the names of steps in failures.
    """

    def __init__(
        self,
        schedule: Schedule,
        transport: Transport,
        blocks: Blocks,
        form: Form,
        own: Tensors,
        *,
        sinks: Tensor | None = None,
        resume: bool = False,
        label: str = "attention",
    ) -> None:
        self.schedule, self.transport, self.blocks, self.form = schedule, transport, blocks, form
        self.rank, self.block = transport.rank, schedule.block_of(transport.rank)
        self.heads = schedule.heads_of(transport.rank)
        self.caller, self.working = dict(own), dict(own)
        self.split = HeadSplit(schedule, transport.rank, transport.device) if schedule.heads else None
        self._sinks = sinks if sinks is None or self.heads is None else sinks[self.heads.q_start : self.heads.q_stop]
        self._resume, self._label = resume, label
        self._total = Accumulator()
        self._flat: dict[Slot, Tensor] = {}
        self._under_way: dict[int, tuple[Handle, list[Message]]] = {}
        self._taken: list[Tensor] = []
        self._written: set[Slot] = set()  # slots of index 0 that hold a sum
        self._held = schedule.slot_blocks(transport.rank)
        self._steps = tuple(self._chosen())

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return ``out`` (B, H, S, E) and the ``lse`` (B, H', S') of the heads and rows worked on."""
        self._run()
        self._finish()
        return (self.caller if self.split and not self._resume else self.working)["out"], self.working["lse"]

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq (B, H, S, D), dk (B, K, T, D), dv (B, K, T, E) of own rows, in the type of sums."""
        self._run()
        grads = self.caller if self.split else self._sums()
        return grads["dq"], grads["dk"], grads["dv"]

    def delta(self) -> Tensor:
        """Return the row sums of dout * out (B, H, S) of the rows and heads that this rank works on."""
        if "delta" not in self.working:
            self.working["delta"] = row_sums(self.working["dout"], self.working["out"])
        return self.working["delta"]

    def own_lse(self) -> Tensor:
        """Return the lse (B, H, S) of own rows after ``forward``; head groups exchange theirs for it."""
        if self.split is None or self._resume:
            return self.working["lse"]
        return self.split.own_lse(self.working["lse"], self.transport, self.form)

    def sink_gradient(self, sinks: Tensor) -> Tensor:
        """Return the gradient of ``sinks`` (H,) by the rows and heads at hand, after ``backward``."""
        mine = slice(None) if self.heads is None else slice(self.heads.q_start, self.heads.q_stop)
        whole = torch.zeros(sinks.shape, dtype=self.form.acc, device=sinks.device)
        whole[mine] = sink_gradient(self.working["lse"], self.delta(), sinks[mine])
        return whole.to(sinks.dtype)

    # -- steps -----------------------------------------------------------------------------------------------

    def _chosen(self) -> Iterable[ScheduleStep]:
        """Leave out exchanges between head groups where the run starts, and ends, with working tensors."""
        skipped: set[int] = set()
        for step in self.schedule.programs[self.rank]:
            if self._resume and isinstance(step, Post) and _role(step) in BORDER:
                skipped.add(step.name)
            elif self._resume and (isinstance(step, Regroup) or (isinstance(step, Wait) and step.name in skipped)):
                continue
            else:
                yield step

    def _run(self) -> None:
        for step in self._steps:
            match step:
                case Post():
                    self._post(step)
                case Wait():
                    handle, _ = self._under_way.pop(step.name)
                    handle.wait()
                case Compute():
                    self.transport.mark(self._name(""), step.q_block if step.q.index else step.kv_block)
                    if self.schedule.phase == "forward":
                        self._forward_pair(step)
                    else:
                        self._backward_pair(step)
                case Fold():
                    self._fold(step)
                case Regroup():
                    self._regroup(step)
        assert not self._under_way, f"posts without a wait: {sorted(self._under_way)}"
        scratch_of(self.transport).give(self._taken)

    def _post(self, step: Post) -> None:
        sends = [Message(p.peer, self._content(p)) for p in step.sends]
        recvs = [Message(p.peer, self._buffer(p.slot)[: size(self._fields(p))]) for p in step.recvs]
        self._written |= {p.slot for p in step.recvs if p.slot.index == 0}
        name = self._name(f"{step.channel} {step.name}")
        handle = self.transport.exchange(sends, recvs, kind=_role(step), step=name, channel=step.channel)
        self._under_way[step.name] = handle, sends  # the messages live until the wait

    def _forward_pair(self, step: Compute) -> None:
        q = self._tensors(step.q, step.q_block)["q"]
        kv = self._tensors(step.kv, step.kv_block)
        pieces = self.schedule.pieces(step.q_block, step.kv_block)
        (result,) = step.results
        if result == Slot("out", 0):
            self.blocks.forward(self._total, q, kv["k"], kv["v"], pieces)
            return
        part = Accumulator()
        self.blocks.forward(part, q, kv["k"], kv["v"], pieces)
        begin(part, q, kv["v"].shape[3])
        target = self._tensors(result, step.q_block)
        for name, x in zip(("out", "lse"), part.finish(), strict=True):
            target[name].copy_(x)

    def _backward_pair(self, step: Compute) -> None:
        given = self._tensors(step.q, step.q_block)
        kv = self._tensors(step.kv, step.kv_block)
        sums: dict[str, Tensor] = {}
        fresh: set[str] = set()
        for slot in step.results:
            tensors = self._tensors(slot, step.kv_block if slot.role == "dkv" else step.q_block)
            sums |= tensors
            if slot not in self._written:
                fresh |= set(tensors)
            if slot.index == 0:  # added to from now on; the others are overwritten every time
                self._written.add(slot)
        pieces = self.schedule.pieces(step.q_block, step.kv_block)
        self.blocks.backward(given, kv["k"], kv["v"], pieces, sums, fresh)

    def _fold(self, step: Fold) -> None:
        source, target = self._tensors(step.source, step.block), step.target
        if step.source.role != "part":
            first = target.index == 0 and target not in self._written
            for name, x in self._tensors(target, step.block).items():
                x.copy_(source[name]) if first else x.add_(source[name])
            if first:
                self._written.add(target)
        elif target == Slot("out", 0):
            begin(self._total, self.working["q"], source["out"].shape[3])  # or it would adopt the buffer's memory
            self._total.add(source["out"], source["lse"])
        else:
            both, into = Accumulator(), self._tensors(target, step.block)
            both.add(into["out"].clone(), into["lse"].clone())
            both.add(source["out"], source["lse"])
            for name, x in zip(("out", "lse"), both.finish(), strict=True):
                into[name].copy_(x)

    def _regroup(self, step: Regroup) -> None:
        assert self.split is not None
        arrived = [
            None if slot is None or slot.index == 0 else views(self._buffer(slot), self._border(step.role, m))
            for m, slot in enumerate(step.slots)
        ]
        if step.role in ("qkv", "dout"):
            self.working |= self.split.gather(self.caller, arrived, step.role)
            return
        self._finish()
        self.caller |= self.split.scatter(self._results(), arrived, step.role, self.form)

    # -- tensors ---------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Round the forward's result once, after the sinks have joined."""
        if self.schedule.phase == "backward" or "out" in self.working:
            return
        begin(self._total, self.working["q"], self.form.value_dim)
        out, lse = self._total.finish()
        if self._sinks is not None:
            lse = add_sinks(out, lse, self._sinks)
        self.working |= {"out": out.to(self.form.dtype), "lse": lse}

    def _sums(self) -> dict[str, Tensor]:
        """Return the backward's result; what nothing was added to is 0."""
        for slot in (Slot("dq", 0), Slot("dkv", 0)):
            if slot not in self._written:
                self._buffer(slot).zero_()
                self._written.add(slot)
        return self._tensors(Slot("dq", 0), self.block) | self._tensors(Slot("dkv", 0), self.block)

    def _results(self) -> dict[str, Tensor]:
        return {"out": self.working["out"]} if self.schedule.phase == "forward" else self._sums()

    def _content(self, parcel: Parcel) -> Tensor:
        """Return the message: a buffer as it is, or own tensors, packed once and kept for later sends."""
        role, fields = parcel.slot.role, self._fields(parcel)
        if parcel.heads is not None:
            assert self.split is not None
            if role in ("out", "dqkv"):
                self._finish()
                tensors = self.split.rows_of(self._results(), parcel.block)
            else:
                tensors = self.split.heads_of(self.caller, parcel.heads)
            return pack(self._take(size(fields)), fields, tensors)
        if parcel.slot.index == 0 and role not in ("dq", "dkv") and parcel.slot not in self._flat:
            self._flat[parcel.slot] = self._take(size(fields))
            pack(self._flat[parcel.slot], fields, self._tensors(parcel.slot, parcel.block))
        return self._buffer(parcel.slot)[: size(fields)]

    def _tensors(self, slot: Slot, block: int) -> dict[str, Tensor]:
        """Return a slot's tensors for the block that it holds now; an input's slot 0 is the caller's."""
        if slot.index == 0 and slot.role in ("kv", "q"):
            return {name: self.working[name] for name in (("q",) if slot.role == "q" else ("k", "v"))}
        if slot.index == 0 and slot.role in ("qd", "qo"):
            self.delta()
            return {name: self.working[name] for name in ("q", "dout", "lse", "delta", "out")}
        rows = self.schedule.rows(slot.role, block)
        return views(self._buffer(slot), self.form.fields(slot.role, rows, self.heads))

    def _buffer(self, slot: Slot) -> Tensor:
        """Return a slot's memory, uint8 (bytes,), made on first use."""
        if slot not in self._flat:
            blocks = self._held.get(slot, (self.block,))
            if slot.role in BORDER:
                n = max(size(self._border(slot.role, m)) for m in range(self.schedule.members))
            else:
                rows = max(self.schedule.rows(slot.role, block) for block in blocks)
                n = size(self.form.fields(slot.role, rows, self.heads))
            # What slot 0 holds is handed to the caller.
            lasting = slot.index == 0
            device = self.transport.device
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
        """Return what comes from a member of the group: its rows and my heads, or my rows and its heads."""
        first = self.rank - self.rank % self.schedule.members
        towards_heads = role in ("qkv", "dout")
        rows = self.schedule.layout.counts[first + member if towards_heads else self.rank]
        return self.form.fields(role, rows, self.heads if towards_heads else self.schedule.heads[member])

    def _name(self, what: str) -> str:
        return f"{self._label} {self.schedule.name} {self.schedule.phase} {what}".rstrip()


def _role(step: Post) -> Role:
    """Return the one role of a post's messages, the ledger's kind."""
    roles = {p.slot.role for p in (*step.sends, *step.recvs)}
    assert len(roles) == 1, f"a post of several roles: {sorted(roles)}"
    return roles.pop()
