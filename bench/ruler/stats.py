"""Paired statistics: bootstrap intervals, sign-flip tests, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 0


def interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of paired differences.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 13.3.
    """
    x = np.asarray(differences, dtype=float)
    rng = np.random.default_rng(SEED)
    means = x[rng.integers(0, len(x), (RESAMPLES, len(x)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flip(differences: Sequence[float], shift: float = 0.0) -> float:
    """Return the one-sided p-value that the mean difference is no more than ``shift``, by flipping signs at random.

    Source: Fisher's randomisation test for paired samples; the sample itself counts as one of the flips.
    """
    x = np.asarray(differences, dtype=float) - shift
    rng = np.random.default_rng(SEED)
    flipped = (rng.choice([-1.0, 1.0], (RESAMPLES, len(x))) * x).mean(axis=1)
    return float((1 + (flipped >= x.mean() - 1e-12).sum()) / (1 + RESAMPLES))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number. Source: Holm 1979, step-down."""
    order = np.argsort(p_values)
    out = [0.0] * len(p_values)
    running = 0.0
    for rank, at in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[at]))
        out[at] = running
    return out
