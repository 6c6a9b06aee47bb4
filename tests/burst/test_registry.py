"""Registries: a name is one class's."""

from __future__ import annotations

import pytest

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
