"""Public peers, and ours beside them, in processes of one GPU each: torch's context_parallel, ring-flash-attn.

Shapes: H query heads, K kv heads, N tokens, S own tokens, D head dim.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import scaled_dot_product_attention

from bench.attention.case import AttentionSettings
from bench.tools.timing import seconds
from burst.execution.attend import attention
from burst.transport.process_group import ProcessGroupTransport

Work = Callable[[], None]
TIMEOUT_S = 300.0


def not_run(name: str, settings: AttentionSettings) -> str:
    """Say why a peer cannot run here, in an empty text when it can."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    if torch.cuda.device_count() < settings.ranks:
        return f"needs {settings.ranks} GPUs, one a rank"
    if name == "ring-flash-attn" and importlib.util.find_spec("ring_flash_attn") is None:
        return "needs the packages ring-flash-attn and flash-attn"
    return ""


def measure(name: str, settings: AttentionSettings) -> dict[str, Any]:
    """Run a peer on all ranks at once and return the slowest rank's seconds: median and spread of the repeats."""
    with tempfile.TemporaryDirectory() as folder:
        # A process that has used CUDA cannot be forked.
        method = "spawn" if settings.device == "cuda" else "fork"
        start_processes(_rank, (name, settings, folder), nprocs=settings.ranks, start_method=method)
        by_rank = [torch.load(Path(folder) / f"{r}") for r in range(settings.ranks)]
    rounds = [max(each) for each in zip(*by_rank, strict=True)]
    return {"seconds": statistics.median(rounds), "seconds_spread": [min(rounds), max(rounds)]}


def _rank(rank: int, name: str, settings: AttentionSettings, folder: str) -> None:
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if settings.device == "cuda" else "cpu"
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", settings.ranks)  # type: ignore[attr-defined]
    t = ProcessGroupTransport.join(rank, settings.ranks, store, device=device, timeout_s=TIMEOUT_S)
    whole = tuple(x.to(device) for x in settings.inputs(settings.tokens))
    work = PEERS[name](settings, t, whole)
    found = []
    for _ in range(settings.warmup + settings.repeats):
        dist.barrier()
        found.append(seconds(work, settings.device))
    torch.save(found[settings.warmup :], f"{folder}/{rank}")
    t.close()


def _ours(settings: AttentionSettings, t: ProcessGroupTransport, whole: tuple[Tensor, ...]) -> Work:
    where = settings.tokens_of(settings.tokens)
    *leaves, dout = (where.shard(x, t.rank, 2) for x in whole)
    leaves = [x.requires_grad_(settings.backward) for x in leaves]

    def work() -> None:
        out = attention(*leaves, transport=t, layout=where)
        assert isinstance(out, Tensor)
        if settings.backward:
            torch.autograd.grad(out, leaves, dout)

    return work


def _context_parallel(settings: AttentionSettings, t: ProcessGroupTransport, whole: tuple[Tensor, ...]) -> Work:
    """Source: torch.distributed.tensor.experimental, which shards the buffers itself and balances causal masks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh(settings.device, (settings.ranks,))
    q, k, v = leaves = [x.clone() for x in whole[:3]]

    def work() -> None:
        with context_parallel(mesh, buffers=leaves, buffer_seq_dims=[2, 2, 2]):
            for x in leaves:
                x.requires_grad_(settings.backward)
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if settings.backward:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            for x in leaves:
                x.requires_grad_(False)

    return work


def _ring_flash_attn(settings: AttentionSettings, t: ProcessGroupTransport, whole: tuple[Tensor, ...]) -> Work:
    """Source: zhuzilin/ring-flash-attention; tokens before heads, zigzag, 2P must divide the tokens."""
    from ring_flash_attn import zigzag_ring_flash_attn_func

    where = settings.tokens_of(settings.tokens)
    *leaves, dout = (where.shard(x, t.rank, 2).transpose(1, 2).contiguous() for x in whole)
    leaves = [x.requires_grad_(settings.backward) for x in leaves]

    def work() -> None:
        out = zigzag_ring_flash_attn_func(*leaves, causal=True)
        if settings.backward:
            torch.autograd.grad(out, leaves, dout)

    return work


PEERS: dict[str, Callable[[AttentionSettings, ProcessGroupTransport, tuple[Tensor, ...]], Work]] = {
    "ours, a GPU a rank": _ours,
    "torch context_parallel": _context_parallel,
    "ring-flash-attn": _ring_flash_attn,
}
