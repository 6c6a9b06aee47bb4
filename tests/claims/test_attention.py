"""Distributed attention: exactness, precision, overhead and failures, on virtual ranks and gloo processes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from burst.execution.attend import attention
from burst.kernels import kernel
from burst.layouts.layout import layout
from burst.transport import Transport, VirtualWorld
from tests.claims.conftest import Claims, most
from tests.support.attention_cases import GRAD_ATOL, OUT_ATOL, Case, compute, dense, inputs, matrix, run
from tests.support.attention_faults import TIMEOUT_S
from tests.support.attention_faults import one as fault

RANKS = (2, 4, 8, 16, 32, 64)
STOCK, ACCURATE = 1.45, 1.2  # times the RMS error of one device's bf16 kernel
OVERHEAD = 1.06  # times the bare kernels' processor time
OF_DENSE = 0.80  # one dense call's processor time over that of all ranks together
FAULTS = 200


def _raised(row: dict[str, Any]) -> bool:
    """Whether the fault struck: in the other runs the rank went wrong after its last message."""
    return any(each and each["raised"] != "nothing" for each in row["found"].values())


def exact(cases: list[Case]) -> dict[str, Any]:
    rows = {case.key: run(case) for case in cases}
    return {
        "ok": all(row["ok"] for row in rows.values()),
        "cases": len(rows),
        "out_error": max(row["out_error"] for row in rows.values()),
        "grad_error": max(row["grad_error"] for row in rows.values()),
        "failed": [key for key, row in rows.items() if not row["ok"]],
    }


def precision(heads: tuple[int, int], accurate: bool, tokens: int = 2048) -> dict[str, Any]:
    """RMS errors of out, dq, dk, dv against fp64, as multiples of one device's bf16 flash attention."""
    base = Case(1, heads=heads, edges=(0, tokens), dim=64, value_dim=64, dtype=torch.bfloat16, accurate=accurate)
    want, drawn = dense(base)[:4], [x.bfloat16() for x in inputs(heads, tokens, 64, 64, 1)[:4]]
    q, k, v = (x.requires_grad_() for x in drawn[:3])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(out, (q, k, v), drawn[3])
    single = [_rms(x, y) for x, y in zip((out.detach(), *grads), want, strict=True)]
    table = {}
    for world in RANKS:
        got, _ = compute(replace(base, world=world))
        errors = [_rms(x, y) for x, y in zip(got[:4], want, strict=True)]
        table[world] = [round(e / s, 3) for e, s in zip(errors, single, strict=True)]
    limit = ACCURATE if accurate else STOCK
    return {
        "ok": all(max(row) <= limit for row in table.values()),
        "one_device_rms": single,
        "times_one_device": table,
        "worst_gradient": max(max(row[1:]) for row in table.values()),
    }


def _rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


def overhead(
    dtype: torch.dtype,
    heads: tuple[int, int],
    backward: str,
    gradients: bool,
    world: int = 4,
    rows: int = 2048,
    dim: int = 64,
    repeats: int = 5,
) -> dict[str, Any]:
    """Processor time of all virtual ranks beside that of their kernel calls alone, and of one dense call."""
    torch.set_num_threads(1)
    where = layout("zigzag", world * rows, world)
    drawn = [x.to(dtype) for x in inputs(heads, world * rows, dim, dim, 1)[:4]]
    own = [[where.shard(x, r, 2) for x in drawn] for r in range(world)]
    ranks = VirtualWorld(world)
    run_block = kernel("auto", "cpu", dtype)
    calls = [
        (own[r][0][:, :, p.q], own[s][1][:, :, p.k], own[s][2][:, :, p.k], own[r][3][:, :, p.q], p.causal)
        for r in range(world)
        for s in range(world)
        for p in where.pieces(r, s)
    ]

    def rank(t: Transport) -> None:
        leaves = [x.detach().requires_grad_(gradients) for x in own[t.rank][:3]]
        out = attention(*leaves, transport=t, layout=where, schedule="ring", backward=backward)
        if gradients:
            assert isinstance(out, Tensor)
            out.backward(own[t.rank][3])

    def bare(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> object:
        out, lse = run_block(q, k, v, causal=causal)
        return run_block.backward(q, k, v, out, lse, dout, causal=causal) if gradients else out

    works: list[Callable[[], object]] = [
        lambda: ranks.run(rank),
        lambda: [bare(*call) for call in calls],
        lambda: bare(drawn[0], drawn[1], drawn[2], drawn[3], True),
    ]
    rounds = [[_cpu_s(work) for work in works] for _ in range(repeats + 1)][1:]
    ratios = [(ours / alone, dense_s / ours) for ours, alone, dense_s in rounds]
    over, share = (statistics.median(r[i] for r in ratios) for i in range(2))
    return {
        "ok": over <= OVERHEAD and share >= OF_DENSE,
        "times_bare": round(over, 4),
        "spread": [round(min(r[0] for r in ratios), 4), round(max(r[0] for r in ratios), 4)],
        "share_of_dense": round(share, 4),
        "dense_cpu_s": round(statistics.median(r[2] for r in rounds), 3),
    }


def _cpu_s(work: Callable[[], object]) -> float:
    start = time.process_time()  # the machine is shared: wall time says little
    work()
    return time.process_time() - start


def test_attention_is_exact(claims: Claims) -> None:
    for where, cases in groupby(matrix(), lambda c: (c.edges, c.heads, c.causal, c.window, c.sinks, c.world)):
        edges, heads, causal, window, sinks, world = where
        mask = f"causal={causal}/window={window}/sinks={sinks}"
        key = f"burst/exact/{'+'.join(map(str, edges))}/{heads}/{mask}/P{world}"
        claims.sample(key, partial(exact, list(cases)))
    rows = claims.under("burst/exact/")
    errors = {"max_out_error": most(rows, "out_error"), "max_grad_error": most(rows, "grad_error")}
    claims.conclude("burst/exact", cases=sum(row["cases"] for row in rows), **errors, limits=[OUT_ATOL, GRAD_ATOL])


def test_precision_is_that_of_one_device(claims: Claims) -> None:
    for heads, accurate in itertools.product(((4, 4), (8, 2)), (False, True)):
        key = f"burst/precision/{heads}/{'accurate' if accurate else 'stock'}"
        claims.sample(key, partial(precision, heads, accurate))
    rows = claims.under("burst/precision/")
    claims.conclude("burst/precision", times_one_device={row["key"]: row["times_one_device"] for row in rows})


def test_processor_time_is_that_of_the_kernels(claims: Claims) -> None:
    for dtype, (heads, backward), gradients in itertools.product(
        (torch.float32, torch.bfloat16), (((8, 2), "kv"), ((4, 4), "q")), (False, True)
    ):
        key = f"burst/overhead/{dtype}/{heads}/{backward}/{'both' if gradients else 'forward'}"
        claims.sample(key, partial(overhead, dtype, heads, backward, gradients))
    rows = claims.under("burst/overhead/")
    claims.conclude("burst/overhead", times_bare=most(rows, "times_bare"), limits=[OVERHEAD, OF_DENSE])


def test_faults_end_all_ranks_in_time(claims: Claims) -> None:
    for seed in range(FAULTS):
        claims.sample(f"burst/fault/{seed}", partial(fault, seed))
    rows = claims.under("burst/fault/")
    raised, hung = sum(map(_raised, rows)), sum(bool(row["hung"]) for row in rows)
    claims.conclude("burst/fault", raised=raised, hung=hung, slowest_s=most(rows, "slowest_s"), deadline_s=TIMEOUT_S)
