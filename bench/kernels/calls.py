"""Kernels timed at some lengths, beside the device's roofline, and their rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from apb.compress import Compressor
from apb.costs.rates import Rates, curve
from bench.kernels.measure import Device


@dataclass(frozen=True)
class KernelTime:
    """One measured kernel: its time, what it must compute and move, and the least that the device needs for that."""

    kernel: str
    tokens: int
    seconds: float
    flops: float
    bytes: float

    def row(self, device: Device) -> dict[str, Any]:
        """Return the line of the table; ``share`` of the roofline: copy bandwidth and matrix rate, both measured."""
        least = max(self.flops / device.matrix_rate, self.bytes / device.copy_rate)
        return {
            "kernel": self.kernel,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "flops_per_s": self.flops / self.seconds,
            "bytes_per_s": self.bytes / self.seconds,
            "bound": "compute" if self.flops / device.matrix_rate >= self.bytes / device.copy_rate else "memory",
            "share": least / self.seconds,
        }


def measured(
    device: Device, tokens: Sequence[int], question: int, compressor: Compressor, on_length: Callable[[int, int], None]
) -> list[KernelTime]:
    """Time every kernel at every length; the LM head for one token and for a tree of 16."""
    s, a, e = device.shape, device.heads, device.shape.element_size
    calls = []
    for done, n in enumerate(tokens):
        on_length(done, len(tokens))
        linear = 2 * s.linear_params / s.layers * n
        weights = s.linear_params / s.layers * e
        calls.append(KernelTime("projections of a layer", n, linear / device.linear_rate(n), linear, weights))
        row = (a.q_heads + a.kv_heads) * (a.qk_dim + a.v_dim) * e  # q and k, out and v
        for causal in (True, False):
            flops = a.pair_flops * a.q_heads * (n * (n + 1) // 2 if causal else n * n)
            seconds = flops / device.attention_rate(n, n, causal)
            calls.append(KernelTime("attention, causal" if causal else "attention, full", n, seconds, flops, n * row))
        calls.append(KernelTime("merge", n, device.merge_s(n), 0, device.merge_bytes(n)))
        kept = max(1, n // 8)
        flops = 2 * a.q_heads * a.qk_dim * n * question
        moved = device.select_bytes(n, kept)
        calls.append(KernelTime("selection", n, device.select_s(n, question, kept, compressor), flops, moved))
    for rows, name in ((s.vocab, "LM head, V rows"), (s.vocab // 4, "LM head, V/4 rows")):
        for n in (1, 16):
            calls.append(KernelTime(name, n, device.head_s(rows, n), 2 * rows * s.hidden * n, rows * s.hidden * e))
    return calls


def as_rates(name: str, calls: Sequence[KernelTime], device: Device, rest_s: float | None = None) -> Rates:
    """Return what ``apb.costs`` needs of the measured calls; ``rest_s`` as there."""

    def found(kernel: str) -> list[KernelTime]:
        return [call for call in calls if call.kernel == kernel]

    def flops(kernel: str) -> tuple[tuple[float, float], ...]:
        return curve([(float(call.tokens), call.flops / call.seconds) for call in found(kernel)])

    longest = max(found("selection"), key=lambda call: call.tokens)
    merge = max(found("merge"), key=lambda call: call.tokens)
    return Rates(
        name=name,
        linear=flops("projections of a layer"),
        causal=flops("attention, causal"),
        full=flops("attention, full"),
        memory=min(device.copy_rate, merge.bytes / merge.seconds),
        select=longest.tokens * device.heads.kv_heads / longest.seconds,
        rest_s=rest_s,
    )
