"""What ``spava`` computes beside full attention: each host's own work, one thread, in one run."""

from __future__ import annotations

from typing import Any

from bench.verify.runner import Recorder
from bench.verify.work import compare


def check(recorder: Recorder, model: str, repeats: int = 3) -> dict[str, Any]:
    """Compare ``spava``."""
    return compare(recorder, model, "spava", "spava", repeats)
