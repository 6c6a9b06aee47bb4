"""Ranks that are killed, stall or disagree in the middle of distributed attention: who notices, how soon."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from burst.errors import HostFailure, UserError
from burst.execution.attend import attention
from burst.layouts.layout import layout
from burst.transport.process_group import ProcessGroupTransport

TIMEOUT_S = 3.0  # the transport's deadline for one operation
SLACK_S = 5.0  # beyond the deadline: starting processes on a busy machine, noticing one peer after another
KINDS = ("kill", "stall", "shape", "dtype", "mode", "late shape")
WAYS = ("ring", "burst", "allgather", "ulysses", "usp")


def one(seed: int) -> dict[str, Any]:
    """Fork 3 or 4 gloo ranks, let one go wrong at a random event, and see that all others raise in time."""
    dice = random.Random(seed)
    world = dice.choice((3, 4))
    plan = {
        "kind": dice.choice(KINDS),
        "world": world,
        "odd": dice.randrange(world),
        "event": dice.randrange(1, 25),
        "way": dice.choice(WAYS),
        "backward": dice.choice(("kv", "q")),
    }
    if plan["way"] in ("allgather", "ulysses"):
        plan["backward"] = "kv"
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        start = time.perf_counter()
        ranks = [context.Process(target=_rank, args=(r, plan, folder)) for r in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT_S * 4 + SLACK_S * 4)
        hung = [r for r, process in enumerate(ranks) if process.is_alive()]
        for r in hung:
            ranks[r].kill()
        seconds = time.perf_counter() - start
        found = {r: _read(Path(folder) / f"{r}.json") for r in range(world)}
    others = [found[r] for r in range(world) if r != plan["odd"]]
    named = all(row and row["step"] and row["rank"] is not None and row["peer"] is not None for row in others)
    # A rank that dies after its last message harms nobody.
    untouched = all(row and row["raised"] == "nothing" for row in others)
    late = max((row["seconds"] for row in others if row), default=0.0)
    ok = not hung and (untouched or named) and late <= TIMEOUT_S + SLACK_S
    return {
        "ok": ok,
        **plan,
        "hung": hung,
        "slowest_s": round(late, 2),
        "wall_s": round(seconds, 2),
        "found": found,
    }


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _rank(rank: int, plan: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    row: dict[str, Any] = {"raised": "nothing", "rank": None, "step": "", "peer": None}
    events = 0

    def observe(event: str, step: str, peer: int) -> None:
        nonlocal events
        events += 1
        if rank == plan["odd"] and events == plan["event"]:
            if plan["kind"] == "kill":
                os._exit(1)
            if plan["kind"] == "stall":
                time.sleep(TIMEOUT_S * 2)

    store = dist.FileStore(f"{folder}/store", plan["world"])  # type: ignore[attr-defined]
    t = ProcessGroupTransport.join(rank, plan["world"], store, timeout_s=TIMEOUT_S, observer=observe)
    start = time.perf_counter()
    try:
        for turn in range(2):
            _call(t, plan, turn)
    except HostFailure as failure:
        row |= {"raised": "HostFailure", "rank": failure.rank, "step": failure.step, "peer": failure.peer}
        row["message"] = failure.message
    except UserError as error:
        row |= {"raised": "UserError", "message": str(error)}
    row["seconds"] = round(time.perf_counter() - start, 2)
    Path(folder, f"{rank}.json").write_text(json.dumps(row))
    os._exit(0)  # without waiting for peers that are gone


def _call(t: ProcessGroupTransport, plan: dict[str, Any], turn: int) -> None:
    odd = t.rank == plan["odd"]
    kind = plan["kind"] if odd else ""
    longer = kind == "shape" or (kind == "late shape" and turn == 1)
    where = layout("zigzag", 80 if longer else 64, t.world)
    dtype = torch.float64 if kind == "dtype" else torch.float32
    own = [torch.randn(1, 4, where.counts[t.rank], 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    out = attention(
        *own,
        transport=t,
        layout=where,
        schedule=plan["way"],
        backward=plan["backward"],
        causal=kind != "mode",
    )
    assert isinstance(out, Tensor)
    out.sum().backward()
