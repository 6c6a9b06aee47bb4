"""Registries: a name is one class's."""

from __future__ import annotations

from pathlib import Path

import pytest

from burst import registry
from burst.errors import UserError
from burst.registry import Registry


def test_a_name_is_one_classes() -> None:
    found: Registry[type[object]] = Registry("thing", "burst.layouts", "thing")

    def again() -> type[object]:
        @found.register("mine", "a class that a notebook's cell writes whenever it runs")
        class Mine:
            pass

        return Mine

    assert again() is not again() and found.summary("mine").startswith("a class")
    kept = found.get("mine")
    with pytest.raises(UserError, match="two classes are registered as the thing 'mine'"):

        @found.register("mine", "another")
        class Other:
            pass

    assert found.get("mine") is kept


def test_two_packages_with_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, module in (("one", "one.part"), ("two", "two.part"), ("one_again", "one.part")):
        about = tmp_path / f"{package}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        group = "burst.layouts" if package == "two" else "burst.schedules"
        (about / "entry_points.txt").write_text(f"[{group}]\npart = {module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._entry_points.cache_clear()
    found: Registry[type[object]] = Registry("thing", "burst.schedules", "thing")
    assert "part" in found._entries()  # one module, found twice
    (tmp_path / "two-1.0.dist-info" / "entry_points.txt").write_text("[burst.schedules]\npart = two.part\n")
    registry._entry_points.cache_clear()
    with pytest.raises(UserError, match="two installed packages"):
        found.get("part")
    registry._entry_points.cache_clear()
