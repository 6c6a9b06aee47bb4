"""Pictures with matplotlib, an optional package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from burst.errors import UserError


def new_figure(width: float = 6.4, height: float = 4.8) -> Any:
    """Return an empty figure of that many inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed
    except ImportError as error:
        raise UserError(
            "plots need matplotlib",
            given="no matplotlib",
            allowed="pip install 'apb-prefill[plots]'",
            remedy="Install it and run again: the samples are kept.",
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def drawn(draw: Callable[[], list[str]], tell: Callable[[str], object]) -> list[str]:
    """Return the files that ``draw`` writes; without matplotlib tell so and return none: numbers do without."""
    try:
        return draw()
    except UserError as error:
        tell(f"No pictures: {error.message}; {error.allowed}.")
        return []
