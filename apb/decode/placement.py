"""Placement of decoding: over the shards where they are, or on one host after gathering them there.

Over shards every host attends to its own part, and every layer waits for a message; on one host nothing is sent, but
all keys are read there, and first they must come.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from apb.plan.shapes import ModelShape
from burst.transport import Transport

PLACEMENTS = ("sharded", "gathered", "auto")
SMALL, LARGE = 1_024, 4_000_000  # bytes from every host: what a link's latency, and its bandwidth, are measured with
READ = 64_000_000  # bytes that are read to measure memory
REPEATS = 3
# Tokens decided by a verification when nothing better is known: what small heads reach on free text.
EXPECTED_LENGTH = 2.5


@dataclass(frozen=True)
class Links:
    """Measured links: seconds and bytes a second of an exchange between all hosts at once, and of reading memory."""

    latency_s: float
    bytes_per_s: float  # into one host
    read_bytes_per_s: float


def measure(transport: Transport) -> Links:
    """Return what this host measures; every host calls this."""
    small, large = (_exchange_s(transport, size) for size in (SMALL, LARGE))
    x = torch.zeros(READ // 4, device=transport.device)
    read_s = statistics.median(_timed(lambda: float(x.sum())) for _ in range(REPEATS))
    received = (transport.world - 1) * (LARGE - SMALL)
    return Links(small, received / max(large - small, 1e-9) if received else 1e12, READ / read_s)


def gathering_pays(links: Links, shape: ModelShape, shards: tuple[int, ...], new_tokens: int, tree_tokens: int) -> bool:
    """Return whether decoding on one host, moving the cache there included, takes less time than over its shards.

    ``shards``: cached tokens by host, the deciding host's last. ``new_tokens``: the longest answer, taken as the
    expected one. ``tree_tokens``: tokens that go through the model at once.
    """
    steps = new_tokens / (EXPECTED_LENGTH if tree_tokens > 1 else 1.0)
    kv_bytes, waits = shape.kv_bytes, sum(shape.sharded.values())
    partials = (len(shards) - 1) * tree_tokens * shape.partial_bytes
    step_s = waits * links.latency_s + partials / links.bytes_per_s
    sharded_s = steps * (step_s + max(shards) * kv_bytes / links.read_bytes_per_s)
    moved_s = sum(shards[:-1]) * kv_bytes / links.bytes_per_s
    gathered_s = moved_s + steps * sum(shards) * kv_bytes / links.read_bytes_per_s
    return gathered_s < sharded_s


def gathered_bytes(shape: ModelShape, cached: int, new_tokens: int, tree_tokens: int) -> int:
    """Return the bytes that a host needs free to gather a cache of ``cached`` tokens and go on from there.

    What it holds of the cache is freed only when all of it is here, and a layer's parts stand beside their whole.
    """
    return (cached + new_tokens + tree_tokens - 1) * shape.kv_bytes + 2 * cached * shape.widest_row


def _exchange_s(transport: Transport, size: int) -> float:
    x = torch.zeros(size, dtype=torch.uint8, device=transport.device)

    def exchange() -> None:
        transport.all_gather(x, [x.shape] * transport.world, kind="probe", step="measure the links").wait()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    exchange()  # connections are made
    return statistics.median(_timed(exchange) for _ in range(REPEATS))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
