"""Times of calls: medians, spreads, ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def seconds(work: Callable[[], object], device: str) -> float:
    """Time a call: processor time on a CPU, which may be shared; elapsed time on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def median_s(work: Callable[[], object], device: str, warmup: int = 1, repeats: int = 3) -> float:
    """Return the median seconds of some calls after others that do not count."""
    for _ in range(warmup):
        work()
    return float(np.median([seconds(work, device) for _ in range(repeats)]))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, interquartile range and number of some values."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "iqr": [float(low), float(high)], "n": len(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Return the spread of ``over / under``, taken pair by pair: what slows a round slows both."""
    return spread([a / b for a, b in zip(over, under, strict=True)])
