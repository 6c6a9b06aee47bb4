"""Pictures with matplotlib, an optional package."""

from __future__ import annotations

from typing import Any

from burst.errors import UserError


def new_figure(width: float = 6.4, height: float = 4.8) -> Any:
    """Return an empty figure of that many inches; raises UserError without matplotlib."""
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
