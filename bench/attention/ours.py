"""Our schedules on virtual ranks: each rank's own work, bytes really sent, errors, modelled communication."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.attention.case import AttentionSettings, rms_error
from burst.execution.attend import attention
from burst.planner.candidates import Candidate
from burst.planner.planner import plan
from burst.planner.topology import Topology, topology
from burst.transport import Transport, VirtualWorld

Parts = list[tuple[Tensor, ...]]


@dataclass
class Ours:
    """One schedule, ready to run: ``candidate`` is its prediction at the measured speed of the kernel."""

    settings: AttentionSettings
    candidate: Candidate

    def __post_init__(self) -> None:
        s = self.settings
        nodes = tuple(r * s.nodes // s.ranks for r in range(s.ranks))
        self.world = VirtualWorld(s.ranks, nodes=nodes, device=s.device)
        if s.device == "cpu":
            for t in self.world.transports:
                t.clock = time.thread_time  # each rank has a thread, and the machine may be shared

    def sharded(self, whole: tuple[Tensor, ...]) -> Parts:
        """Return every rank's rows of q, k, v, dout."""
        where = self.settings.tokens_of(whole[0].shape[2])
        return [tuple(where.shard(x, r, 2) for x in whole) for r in range(self.settings.ranks)]

    def run(self, parts: Parts) -> tuple[Parts, list[float]]:
        """Attend once and return every rank's out (and dq, dk, dv) and own work in seconds."""
        s = self.settings
        where = s.tokens_of(sum(part[0].shape[2] for part in parts))

        def rank(t: Transport) -> tuple[tuple[Tensor, ...], float]:
            *leaves, dout = (x.detach() for x in parts[t.rank])
            leaves = [x.requires_grad_(s.backward) for x in leaves]
            start, waited = t.clock(), t.waited_s
            out = attention(
                *leaves, transport=t, layout=where, schedule=self.candidate.name, ulysses=self.candidate.ulysses
            )
            assert isinstance(out, Tensor)
            if s.backward:
                out.backward(dout)
            if s.device != "cpu":
                torch.cuda.synchronize()
            work = t.clock() - start - (t.waited_s - waited)
            grads = [x.grad for x in leaves if x.grad is not None]
            return (out.detach(), *grads), work

        found = self.world.run(rank)
        return [result for result, _ in found], [work for _, work in found]

    def error(self, whole: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
        """Return the largest relative RMS error of out and gradients."""
        parts, _ = self.run(self.sharded(whole))
        where = self.settings.tokens_of(whole[0].shape[2])
        return rms_error(tuple(where.unshard(each, 2) for each in zip(*parts, strict=True)), want)

    def sent(self) -> int:
        """Bytes that all ranks have sent so far, agreements left out."""
        return sum(
            count for t in self.world.transports for kind, count in t.ledger.by_kind().items() if kind != "agree"
        )


def candidates(settings: AttentionSettings, flops: float) -> list[Candidate]:
    """Predict every schedule at the kernel's measured speed and the preset links of the kind of device."""
    base: Topology = topology(settings.ranks, settings.nodes, settings.device)
    where = topology(settings.ranks, settings.nodes, replace(base.machine, flops=flops))
    tokens = settings.tokens_of(settings.tokens)
    return list(plan(tokens, settings.shape(), where, backward=settings.backward).candidates)
