"""Rows on disk, and claims that are concluded from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from bench.tools.rows import RowStore
from tests.claims import conftest
from tests.claims.conftest import Claims


def test_rows_survive_a_killed_run(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = RowStore(file)
    rows.add("a", {"x": 1})
    rows.add("b", {"x": 2})
    rows.add("a", {"x": 3})
    with file.open("a") as out:
        out.write('{"key": "c", "x"')
    again = RowStore(file)
    assert [row["x"] for row in again] == [3, 2] and "c" not in again
    again.add("c", {"x": 4})
    assert [row["x"] for row in RowStore(file)] == [3, 2, 4]


def test_a_sample_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        row = RowStore(tmp_path / "rows.jsonl").sample("a/1", lambda: {"ok": True, "error": 2e-5})
        assert row["error"] == 2e-5 and row["commit"] and row["seconds"] >= 0
    assert capsys.readouterr().err == "ok   a/1  error=2e-05\n"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


def test_a_claim_holds_when_all_of_its_samples_do(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims.jsonl", "tiny")
    claims.sample("full/1", lambda: {"ok": True})
    claims.conclude("full", errors=[1.0])
    claims.sample("full/2", lambda: {"ok": False})
    with pytest.raises(AssertionError):
        claims.conclude("full", errors=[1.0])
    kept = {row["key"]: row for row in RowStore(tmp_path / "claims.jsonl")}
    assert not kept["full"]["ok"] and kept["full"]["failed"] == ["full/2"] and kept["full"]["samples"] == 2
    with pytest.raises(AssertionError):
        claims.conclude("twins")  # nothing was measured


@pytest.mark.parametrize(("marks", "left"), [("", ["ring"]), ("not slow", ["ring"]), ("claims", ["ring", "twins"])])
def test_claims_run_only_when_they_are_named(marks: str, left: list[str]) -> None:
    folder = Path(conftest.__file__).parent
    items: list[Any] = [Mock(path=folder.parent / "ring.py"), Mock(path=folder / "twins.py")]
    config = Mock()
    config.getoption.return_value = marks
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.path.stem for item in items] == left
