"""The whole matrix of families: any hosts, layout and length, drafts, forks, gathered caches and chunks."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from tests.claims.conftest import Claims, most
from tests.support.families import FAMILIES
from tests.support.matrix import LIMIT, Cell, cells, run


def sampled(cell: Cell) -> dict[str, Any]:
    found = run(cell)
    return {"ok": not found.failed and not found.rejected, **dataclasses.asdict(found)}


def test_every_family_over_hosts_equals_a_whole_run(claims: Claims) -> None:
    for cell in cells(list(FAMILIES)):
        claims.sample(f"families/{cell.key}", partial(sampled, cell))
    rows = claims.under("families/")
    ties = sum(row["ties"] for row in rows)
    claims.conclude("families", max_logits_error=most(rows, "error"), ties=ties, limits=[LIMIT])
