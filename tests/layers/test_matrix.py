"""Every family over hosts equals whole runs of transformers' own model: a sample of the matrix."""

from __future__ import annotations

import pytest

from tests.support.families import FAMILIES
from tests.support.matrix import Cell, adapter, run

LONG, SHORT = 131, 9  # blocks far above a window, and below it
NAMES = list(FAMILIES)


@pytest.mark.parametrize("family", NAMES)
def test_kinds_are_those_of_the_table(family: str) -> None:
    assert tuple(kind.name for kind in adapter(family, True).shape.mixers) == FAMILIES[family].kinds


def check(cell: Cell) -> None:
    found = run(cell)
    assert not found.failed and not found.rejected, found


@pytest.mark.parametrize("family", NAMES)
def test_a_long_context_over_three_hosts(family: str) -> None:
    check(Cell(family, 3, "zigzag", LONG, 6, (7,), ("lookup", "eagle2"), reuse=True))


@pytest.mark.parametrize("family", NAMES)
def test_a_short_context_over_other_hosts(family: str) -> None:
    number = NAMES.index(family)
    check(Cell(family, (2, 4)[number % 2], ("contiguous", "zigzag")[number // 2 % 2], SHORT, 6, (), ("lookup",)))
