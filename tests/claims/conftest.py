"""Claims: checks too long for every day, run with ``-m claims``; their numbers are kept, a stopped run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.tools.output import dated
from bench.tools.rows import RowStore


class Claims(RowStore):
    """The samples of this run's file, and what is concluded from them."""

    def __init__(self, file: Path, model: str) -> None:
        super().__init__(file)
        self.model = model

    def conclude(self, claim: str, **said: Any) -> None:
        """Keep what a claim's samples ``claim/...`` say together; fails unless all are ``ok``."""
        rows = self.under(f"{claim}/")
        failed = [row["key"] for row in rows if not row["ok"]]
        commits = sorted({row["commit"] for row in rows})
        self.add(claim, {"ok": not failed, "samples": len(rows), "failed": failed, **said, "commits": commits})
        assert rows and not failed


def most(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the largest value of that name."""
    return max(float(row[name]) for row in rows)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave claims out unless ``-m`` speaks of them; give each its marker and no deadline."""
    here = {item for item in items if Path(__file__).parent in item.path.parents}
    for item in here:
        item.add_marker(pytest.mark.claims)
        item.add_marker(pytest.mark.timeout(0))
    if "claims" not in config.getoption("markexpr") and here:
        config.hook.pytest_deselected(items=list(here))
        items[:] = [item for item in items if item not in here]


@pytest.fixture
def data(request: pytest.FixtureRequest) -> list[str]:
    """The files of ``--claims-data``."""
    found: list[str] = request.config.getoption("--claims-data")
    return found


@pytest.fixture(scope="session")
def claims(request: pytest.FixtureRequest) -> Claims:
    """Where samples go: ``--claims-out``, else bench/results/DATE-claims.jsonl."""
    given = request.config.getoption("--claims-out")
    return Claims(Path(given) if given else dated("claims.jsonl"), request.config.getoption("--claims-model"))
