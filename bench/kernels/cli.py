"""``apb bench kernels``: the roofline's table, and the rates file that ``apb bench simulate`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb.compress import Compressor
from apb.costs.rates import Rates, curve
from bench import report
from bench.hardware import hardware
from bench.kernels.measure import Device
from bench.prompts import base_setup
from bench.rows import Rows, provenance
from burst.errors import UserError
from launch.display import Display, size
from launch.settings import chosen_compressor, in_range, typed


@dataclass(frozen=True)
class KernelSettings:
    """conf/bench/kernels.yaml."""

    tokens: tuple[int, ...]
    question_tokens: int
    repeats: int
    save: bool


@dataclass(frozen=True)
class Call:
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


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Measure, show and return the document; writes ``out``/rates.json."""
    asked = typed(KernelSettings, config["bench"], "bench.")
    in_range("bench.tokens", list(asked.tokens), bool(asked.tokens) and min(asked.tokens) >= 16, "numbers, 16 or more")
    for key in ("question_tokens", "repeats"):
        in_range(f"bench.{key}", getattr(asked, key), getattr(asked, key) >= 1, "1 or more")
    base = base_setup(config, display)
    device = Device(base.shape, base.spec.dtype, base.spec.device, asked.repeats)
    compressor = _compressor(config)
    calls = measured(device, asked.tokens, asked.question_tokens, compressor, display)
    name = f"{hardware(base)}, {config['model']['name']}, {base.spec.dtype}"
    rates = as_rates(name, calls, device)
    rows = [call.row(device) for call in calls]
    _show(rows, device, name, display)
    document = {
        "bench": "kernels",
        "rows": rows,
        "matrix_flops_per_s": device.matrix_rate,
        "copy_bytes_per_s": device.copy_rate,
        **provenance(config, hardware(base)),
    }
    out = config.get("out")
    if out:
        rates.save(Path(out) / "rates.json", **{k: v for k, v in document.items() if k != "rows"})
        display.note(f"Rates for 'apb bench simulate bench.rates=...': {Path(out) / 'rates.json'}")
    if asked.save:
        kept, shared = Rows(report.dated("kernels.jsonl")), {k: v for k, v in document.items() if k != "rows"}
        for row in rows:
            kept.add(f"{name}/{row['kernel']}/{row['tokens']}", {**shared, **row})
    return document


def _compressor(config: Mapping[str, Any]) -> Compressor:
    made = chosen_compressor(config)
    if made is None or made.needs_projections:
        raise UserError(
            "the selection benchmark scores random queries and keys",
            given=f"compress={'null' if made is None else made.name}",
            allowed="compressors that read queries and keys, such as query, expected, snapkv and norm",
            remedy="Set compress=query.",
        )
    return made


def measured(
    device: Device, tokens: Sequence[int], question: int, compressor: Compressor, display: Display
) -> list[Call]:
    """Time every kernel at every length; the LM head for one token and for a tree of 16."""
    s, e = device.shape, device.shape.element_size
    calls = []
    with display.progress() as on_progress:
        for done, n in enumerate(tokens):
            on_progress("Lengths", done, len(tokens))
            linear = 2 * s.linear_params / s.layers * n
            weights = s.linear_params / s.layers * e
            calls.append(Call("projections of a layer", n, linear / device.linear_rate(n), linear, weights))
            row = (2 * s.q_heads + 2 * s.kv_heads) * s.head_dim * e  # q and out, k and v
            for causal in (True, False):
                flops = 4 * s.head_dim * s.q_heads * (n * (n + 1) // 2 if causal else n * n)
                seconds = flops / device.attention_rate(n, n, causal)
                calls.append(Call("attention, causal" if causal else "attention, full", n, seconds, flops, n * row))
            calls.append(Call("merge", n, device.merge_s(n), 0, device.merge_bytes(n)))
            kept = max(1, n // 8)
            flops = 2 * s.q_heads * s.head_dim * n * question
            moved = device.select_bytes(n, kept)
            calls.append(Call("selection", n, device.select_s(n, question, kept, compressor), flops, moved))
    for rows, name in ((s.vocab, "LM head, V rows"), (s.vocab // 4, "LM head, V/4 rows")):
        for n in (1, 16):
            calls.append(Call(name, n, device.head_s(rows, n), 2 * rows * s.hidden * n, rows * s.hidden * e))
    return calls


def as_rates(name: str, calls: Sequence[Call], device: Device) -> Rates:
    """Return what ``apb.costs`` needs of the measured calls."""

    def found(kernel: str) -> list[Call]:
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
        select=longest.tokens * device.shape.kv_heads / longest.seconds,
    )


def _show(rows: Sequence[Mapping[str, Any]], device: Device, name: str, display: Display) -> None:
    display.note(
        f"{name}: {device.matrix_rate / 1e12:.3g} TFLOP/s in a large square product, {size(device.copy_rate)}/s copied "
        "(read and written both counted).",
        style="bold",
    )
    table = [
        [
            row["kernel"],
            f"{row['tokens']:,}",
            f"{1e3 * row['seconds']:.3f}",
            f"{row['flops_per_s'] / 1e12:.3g}",
            f"{row['bytes_per_s'] / 1e9:.3g}",
            row["bound"],
            f"{row['share']:.0%}",
        ]
        for row in rows
    ]
    display.table(
        "Kernels against the roofline", ["", "tokens", "ms", "TFLOP/s", "GB/s", "bound", "of roofline"], table
    )
