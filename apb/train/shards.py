"""Labelled tokens on disk, one safetensors file a prompt, so that epochs cost no forward pass.

Shapes: N tokens drawn from a prompt, T its document tokens, K kv heads, E width of a head's input.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from apb.compress.heads import Head
from apb.models.adapter import Adapter
from apb.train.labels import observe
from apb.train.prompts import LabelPrompt
from burst.kernels import Kernel

TOP_SHARE = 0.1  # of a prompt's tokens: those that a head must find


def margin(importance_KT: Tensor) -> Tensor:
    """Return (K, T): how far a token stands above its head's top 10%, in standard deviations; the top ones are > 0."""
    tokens = importance_KT.shape[-1]
    top = top_count(tokens)
    ordered_KT = importance_KT.sort(dim=-1, descending=True).values
    threshold_K1 = (ordered_KT[:, top - 1 : top] + ordered_KT[:, min(top, tokens - 1)].unsqueeze(-1)) / 2
    return (importance_KT - threshold_K1) / importance_KT.std(dim=-1, keepdim=True).clamp_min(1e-6)


def top_count(tokens: int) -> int:
    """Return how many of a document's tokens are its top 10%."""
    return max(1, round(tokens * TOP_SHARE))


def write(
    file: Path, adapter: Adapter, kernel: Kernel, sample: LabelPrompt, *, embedded: bool, keep: int, seed: int
) -> None:
    """Label a prompt and write at most ``keep`` of its document tokens, the same ones in every layer.

    Per layer ``x.I`` (N, E), bf16, and ``y.I`` (N, K), fp32 margins. The file appears whole or not at all.
    """
    tensors: dict[str, Tensor] = {}
    chosen: list[Tensor] = []

    def on_layer(layer: int, x_TE: Tensor, importance_KT: Tensor) -> None:
        if not chosen:
            order = torch.randperm(len(x_TE), generator=torch.Generator().manual_seed(seed))
            chosen.append(order[:keep].sort().values.to(x_TE.device))
        tensors[f"x.{layer}"] = x_TE[chosen[0]].to(torch.bfloat16).cpu()
        tensors[f"y.{layer}"] = margin(importance_KT).T[chosen[0]].contiguous().cpu()

    observe(adapter, kernel, sample, embedded=embedded, on_layer=on_layer)
    unfinished = file.with_suffix(".part")
    save_file(tensors, unfinished)
    os.replace(unfinished, file)


def read(files: list[Path], layer: int) -> tuple[Tensor, Tensor]:
    """Return one layer's inputs (sum of N, E), bf16, and margins (sum of N, K), fp32, of all files in order."""
    xs, ys = [], []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            xs.append(tensors.get_tensor(f"x.{layer}"))
            ys.append(tensors.get_tensor(f"y.{layer}"))
    return torch.cat(xs), torch.cat(ys)


def write_head(file: Path, head: Head) -> None:
    """Write one layer's head as it was fitted, whole or not at all."""
    parts = {"fc1": head.fc1_WE, "bias": head.bias_W, "fc2": head.fc2_KW}
    unfinished = file.with_suffix(".part")
    save_file({name: part.contiguous().cpu() for name, part in parts.items() if part is not None}, unfinished)
    os.replace(unfinished, file)


def read_head(file: Path) -> Head:
    """Return one layer's head, fp32, on the CPU."""
    parts = load_file(file)
    return Head(parts["fc1"], parts.get("bias"), parts.get("fc2"))
