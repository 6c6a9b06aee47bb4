"""Parts of the GPU check, each measured by itself, at Llama-3.1-8B's shape with random weights in bfloat16.

Times in seconds; nothing here says anything about what is attended to.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

import burst.kernels.merge as merging
from apb.compress import compressor
from apb.costs.network import Network
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from bench.emulate.shares import emulate
from bench.kernels.calls import measured
from bench.kernels.measure import Device
from bench.tools.output import say
from bench.tools.prompts import lengths, random_prompt, setups
from bench.tools.timing import median_s
from burst.kernels import flash_attn, kernel
from burst.kernels.merge import Accumulator

MODEL, DTYPE = "llama3.1-8b-shape", "bfloat16"
TOKENS, QUERY, HOSTS = 131_072, 64, 8
KERNEL_TOKENS = (1_024, 16_384, 131_072)
STRATEGIES = ("full", "ring", "star", "apb", "spava")


@cache
def conf(group: str, name: str) -> dict[str, Any]:
    """Return a preset of conf/, read without Hydra."""
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "conf" / group / f"{name}.yaml").read_text())
    return found


def kernels() -> dict[str, Any]:
    """Time the kernels of ``apb bench kernels`` beside the device's roofline."""
    device = _device(_setup())
    calls = measured(device, KERNEL_TOKENS, 16, compressor("query"), lambda done, total: None)
    rates = {"matrix_flops_per_s": device.matrix_rate, "copy_bytes_per_s": device.copy_rate}
    return {"ok": True, "rows": [call.row(device) for call in calls], **rates}


def emulated() -> dict[str, Any]:
    """Time 8 hosts of each strategy, as ``apb bench emulate`` does."""
    base = _setup()
    prompt = random_prompt(lengths(TOKENS, QUERY), base.shape.vocab)
    everyone = setups(base, STRATEGIES, HOSTS, None)
    _, told = emulate(everyone, prompt, prompt, Network(**conf("network", "nvlink")), 3, _device(base), say)
    return {"tokens": TOKENS, **told}


def _setup() -> Setup:
    config = conf("model", MODEL)["config"]
    return Setup.make(EngineOptions(MODEL, hosts=1, strategy="full", dtype=DTYPE, device="cuda"), config=config)


def _device(setup: Setup) -> Device:
    return Device(setup.shape, setup.spec.dtype, setup.spec.device)


def merge() -> dict[str, Any]:
    """Time the merge of a block's output in bfloat16 into its sums, fused and by torch; beside the bytes' own time."""
    rows, heads, dim = TOKENS // HOSTS, 32, 128
    with torch.inference_mode():
        out, part = (torch.randn(1, heads, rows, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        lse, part_lse = (torch.randn(1, heads, rows, device="cuda") for _ in range(2))

        def run() -> None:
            total = Accumulator()
            total.add(out, lse)
            total.add(part, part_lse)
            total.finish(out.dtype)

        fused = median_s(run, "cuda", repeats=20)
        has_triton, merging._has_triton = merging._has_triton, lambda: False  # type: ignore[assignment]
        try:
            plain = median_s(run, "cuda", repeats=20)
        finally:
            merging._has_triton = has_triton
    return {"ok": has_triton() and fused < plain, "fused_s": fused, "torch_s": plain, "bytes": 3 * out.numel() * 2}


def attention() -> dict[str, Any]:
    """Time one causal call of the whole context by every kernel; the one that ``auto`` takes must be the fastest."""
    heads, kv_heads, dim = 32, 8, 128
    rates: dict[str, float] = {}
    with torch.inference_mode():
        q, k, v = (
            torch.randn(1, n, TOKENS, dim, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
        )
        for name in ("cuda", "cudnn", "flash_attn"):
            if name == "flash_attn" and flash_attn.best(q.device) is None:
                continue
            seconds = median_s(lambda name=name: kernel(name)(q, k, v, causal=True), "cuda")  # type: ignore[misc]
            rates[name] = 4 * dim * heads * (TOKENS * (TOKENS + 1) // 2) / seconds
    chosen = kernel("auto", q.device, q.dtype).name
    missed = [
        f"'{name}' runs at {rate / rates[chosen]:.2f} of '{chosen}', which 'auto' takes"
        for name, rate in rates.items()
        if rate > 1.05 * rates[chosen]
    ]
    return {"ok": not missed, "missed": missed, "flops_per_s": rates, "auto": chosen}


# Parts that take a process of their own: memory is free again after each, and each has a deadline.
PARTS = {"kernels": kernels, "emulate": emulated}
