"""``apb bench kernels``: the roofline's table, and the rates file that ``apb bench simulate`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apb.compress import Compressor
from bench.kernels.calls import as_rates, measured
from bench.kernels.measure import Device
from bench.settings import KernelSettings
from bench.tools.conditions import hardware, provenance
from bench.tools.rows import keep
from bench.tools.setup import base_setup
from burst.errors import UserError, in_range
from launch.config.build import chosen_compressor
from launch.config.typed import typed
from launch.terminal.display import Display, size


def run(config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Measure, show and return the document; writes ``out``/rates.json."""
    asked = typed(KernelSettings, config["bench"], "bench.")
    in_range("bench.tokens", list(asked.tokens), bool(asked.tokens) and min(asked.tokens) >= 16, "numbers, 16 or more")
    for key in ("question_tokens", "repeats"):
        in_range(f"bench.{key}", getattr(asked, key), getattr(asked, key) >= 1, "1 or more")
    base = base_setup(config, display)
    device = Device(base.shape, base.spec.dtype, base.spec.device, asked.repeats)
    compressor = _compressor(config)
    with display.progress() as on_progress:
        calls = measured(
            device,
            asked.tokens,
            asked.question_tokens,
            compressor,
            lambda done, all_: on_progress("Lengths", done, all_),
        )
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
    shared = {k: v for k, v in document.items() if k != "rows"}
    out = config.get("out")
    if out:
        rates.save(Path(out) / "rates.json", **shared)
        display.note(f"Rates for 'apb bench simulate bench.rates=...': {Path(out) / 'rates.json'}")
    if asked.save:
        keep("kernels", ((f"{name}/{row['kernel']}/{row['tokens']}", {**shared, **row}) for row in rows))
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
