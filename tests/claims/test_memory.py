"""A gloo host grows by its KV and little more; in chunks, what is beside it does not grow with the block."""

from __future__ import annotations

from typing import Any

import pytest

from tests.claims.conftest import Claims
from tests.claims.ranks import MEASURED_CHUNK, torchrun

OVER_KV_MB = 150.0  # apb, 7,300 tokens on 8 hosts
LENGTHS = (2000, 7000)
MAY_GROW_MB = 24.0  # from the short block to the long one, beside KV and what the plan says stays whole


def measured(claims: Claims, key: str, hosts: int, strategy: str, tokens: int, chunk: int) -> dict[str, Any]:
    return claims.sample(key, lambda: {"ok": True, **torchrun(hosts, "memory", claims.model, strategy, tokens, chunk)})


def test_a_host_grows_by_its_kv(claims: Claims) -> None:
    row = measured(claims, "memory/0", 8, "apb", 7300, 0)
    over = max(row["over_kv_mb"])
    claims.conclude("memory", kv_mb=max(row["kv_mb"]), over_kv_mb=over, allowed_over_kv_mb=OVER_KV_MB)
    assert over <= OVER_KV_MB


@pytest.mark.parametrize("strategy", ["full", "star", "apb", "spava", "ring"])
def test_chunks_bound_what_a_block_needs(claims: Claims, strategy: str) -> None:
    hosts = 1 if strategy == "full" else 2
    rows = {
        name: measured(claims, f"chunks/{strategy}/{chunk}/{tokens}", hosts, strategy, tokens, chunk)
        for name, chunk, tokens in (
            ("short", MEASURED_CHUNK, LENGTHS[0]),
            ("long", MEASURED_CHUNK, LENGTHS[1]),
            ("long_whole", 0, LENGTHS[1]),
        )
    }
    beside = {name: row["beside_mb"] for name, row in rows.items()}
    grows = round(beside["long"] - beside["short"], 1)
    claims.conclude(f"chunks/{strategy}", beside_mb=beside, grows_mb=grows, may_grow_mb=MAY_GROW_MB)
    assert grows <= MAY_GROW_MB
