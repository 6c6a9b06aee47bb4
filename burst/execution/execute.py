"""Execution of one rank's program: the only place where a schedule meets tensors.

Shapes: B batch, H query heads, K kv heads, S rows of a block, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from burst.execution.blocks import Blocks, add_sinks, begin, sink_gradient
from burst.execution.buffers import Form
from burst.execution.memory import SlotMemory
from burst.kernels.merge import Accumulator
from burst.schedules.base import Schedule
from burst.schedules.payload import Role
from burst.schedules.steps import BORDER, Compute, Fold, Post, Regroup, ScheduleStep, Slot, Wait
from burst.transport import Handle, Message, Transport


class Execution:
    """One rank's run of one schedule.

    ``own`` are the rank's tensors by name, rows in the order of ``Schedule.layout``: forward q (B, H, S, D),
    k (B, K, T, D), v (B, K, T, E), the latter two as wide as ``form.carried`` where that says so; backward also
    lse (B, H, S), out and dout (B, H, S, E). In head groups the backward takes all but dout as the forward left them
    in ``working``; ``resume`` starts a forward there.
    ``label`` begins the names of steps in failures; ``kv`` is the ledger's kind of keys and values on their way.
    """

    def __init__(
        self,
        schedule: Schedule,
        transport: Transport,
        blocks: Blocks,
        form: Form,
        own: Mapping[str, Tensor],
        *,
        sinks: Tensor | None = None,
        resume: bool = False,
        label: str = "attention",
        kv: str = "kv",
    ) -> None:
        self.schedule, self.transport, self.blocks, self.form = schedule, transport, blocks, form
        self.memory = SlotMemory(schedule, transport, form, own)
        self.working = self.memory.working
        heads, self._split = self.memory.heads, self.memory.split
        self._own_heads = slice(None) if heads is None else slice(heads.q_start, heads.q_stop)
        self._sinks = None if sinks is None else sinks[self._own_heads]
        self._resume, self._label, self._kv = resume, label, kv
        self._total = Accumulator()
        self._under_way: dict[int, tuple[Handle, list[Message]]] = {}
        self._steps = tuple(self._chosen())

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return ``out`` (B, H, S, E) and the ``lse`` (B, H', S') of the heads and rows worked on."""
        self._run()
        self._finish()
        return (self.memory.caller if self._split and not self._resume else self.working)["out"], self.working["lse"]

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq (B, H, S, D), dk (B, K, T, D), dv (B, K, T, E) of own rows, in the type of sums."""
        self._run()
        grads = self.memory.caller if self._split else self.memory.results()
        return grads["dq"], grads["dk"], grads["dv"]

    def own_lse(self) -> Tensor:
        """Return the lse (B, H, S) of own rows after ``forward``; head groups exchange theirs for it."""
        if self._split is None or self._resume:
            return self.working["lse"]
        return self._split.own_lse(self.working["lse"], self.transport, self.form)

    def sink_gradient(self, sinks: Tensor) -> Tensor:
        """Return the gradient of ``sinks`` (H,) by the rows and heads at hand, after ``backward``."""
        whole = torch.zeros(sinks.shape, dtype=self.form.acc, device=sinks.device)
        share = sink_gradient(self.working["lse"], self.memory.delta(), sinks[self._own_heads])
        whole[self._own_heads] = share
        return whole.to(sinks.dtype)

    # -- steps -----------------------------------------------------------------------------------------------

    def _chosen(self) -> Iterable[ScheduleStep]:
        """Leave out exchanges between head groups where the run starts, and ends, with working tensors."""
        skipped: set[int] = set()
        for step in self.schedule.programs[self.transport.rank]:
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
        self.memory.release()

    def _post(self, step: Post) -> None:
        if _role(step) == "out":
            self._finish()
        sends = [Message(p.peer, self.memory.content(p)) for p in step.sends]
        recvs = [Message(p.peer, self.memory.space(p)) for p in step.recvs]
        self.memory.written |= {p.slot for p in step.recvs if p.slot.index == 0}
        name = self._name(f"{step.channel} {step.name}")
        kind = self._kv if _role(step) == "kv" else _role(step)
        handle = self.transport.exchange(sends, recvs, kind=kind, step=name, channel=step.channel)
        self._under_way[step.name] = handle, sends  # the messages live until the wait

    def _forward_pair(self, step: Compute) -> None:
        q = self.memory.tensors(step.q, step.q_block)["q"]
        kv = self.memory.tensors(step.kv, step.kv_block)
        pieces = self.schedule.pieces(step.q_block, step.kv_block)
        (result,) = step.results
        if result == Slot("out", 0):
            self.blocks.forward(self._total, q, kv["k"], kv["v"], pieces)
            return
        part = Accumulator()
        self.blocks.forward(part, q, kv["k"], kv["v"], pieces)
        begin(part, q, self.form.value_dim)
        target = self.memory.tensors(result, step.q_block)
        for name, x in zip(("out", "lse"), part.finish(), strict=True):
            target[name].copy_(x)

    def _backward_pair(self, step: Compute) -> None:
        given = self.memory.tensors(step.q, step.q_block)
        kv = self.memory.tensors(step.kv, step.kv_block)
        sums: dict[str, Tensor] = {}
        fresh: set[str] = set()
        for slot in step.results:
            tensors = self.memory.tensors(slot, step.kv_block if slot.role == "dkv" else step.q_block)
            sums |= tensors
            if slot not in self.memory.written:
                fresh |= set(tensors)
            if slot.index == 0:  # added to from now on; the others are overwritten every time
                self.memory.written.add(slot)
        pieces = self.schedule.pieces(step.q_block, step.kv_block)
        self.blocks.backward(given, kv["k"], kv["v"], pieces, sums, fresh)

    def _fold(self, step: Fold) -> None:
        source, target = self.memory.tensors(step.source, step.block), step.target
        if step.source.role != "part":
            first = target.index == 0 and target not in self.memory.written
            for name, x in self.memory.tensors(target, step.block).items():
                x.copy_(source[name]) if first else x.add_(source[name])
            if first:
                self.memory.written.add(target)
        else:
            assert target == Slot("out", 0), "partial outputs go straight home"
            begin(self._total, self.working["q"], source["out"].shape[3])  # or it would adopt the buffer's memory
            self._total.add(source["out"], source["lse"])

    def _regroup(self, step: Regroup) -> None:
        assert self._split is not None
        arrived = self.memory.arrived(step.role, step.slots)
        if step.role in ("qkv", "dout"):
            self.working |= self._split.gather(self.memory.caller, arrived, step.role)
            return
        self._finish()
        self.memory.caller |= self._split.scatter(self.memory.results(), arrived, step.role, self.form)

    def _finish(self) -> None:
        """Round the forward's result once, after the sinks have joined."""
        if self.schedule.phase == "backward" or "out" in self.working:
            return
        begin(self._total, self.working["q"], self.form.value_dim)
        out, lse = self._total.finish()
        if self._sinks is not None:
            lse = add_sinks(out, lse, self._sinks)
        self.working |= {"out": out.to(self.form.dtype), "lse": lse}

    def _name(self, what: str) -> str:
        return f"{self._label} {self.schedule.name} {self.schedule.phase} {what}".rstrip()


def _role(step: Post) -> Role:
    """Return the one role of a post's messages, the ledger's kind."""
    roles = {p.slot.role for p in (*step.sends, *step.recvs)}
    assert len(roles) == 1, f"a post of several roles: {sorted(roles)}"
    return roles.pop()
