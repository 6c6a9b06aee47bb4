"""Number of draft tokens worth verifying, by the head's confidence and measured times."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

REMEMBERED = 32  # verifications whose times count: links and machines change
FIRST = 4  # where all times are of one size, the next tree has one row in so many: two sizes tell what a row takes


class Stride:
    """Chooses the size of every tree, up to ``most`` rows.

    A verification takes a fixed time (weights, shards read once, a message's latency in every layer) and a time a row
    (arithmetic, and the bandwidth of partial outputs): a line through the times measured so far tells them apart.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._times: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def measured(self, rows: int, seconds: float) -> None:
        """Note how long a tree of ``rows`` rows took."""
        self._times.append((rows, seconds))

    def rows(self, values: Sequence[float]) -> int:
        """Return the rows of the next tree, its root included; ``values``: its candidates, as for ``best_size``."""
        room = min(self._most, 1 + len(values))
        if not self._times:
            return room
        rows = np.array([r for r, _ in self._times], dtype=np.float64)
        seconds = np.array([s for _, s in self._times])
        if np.ptp(rows) == 0:
            other = max(2, min(room, self._most // FIRST))
            return room if rows[0] == other else other
        row_s = max(0.0, float(np.cov(rows, seconds, bias=True)[0, 1] / rows.var()))
        fixed_s = max(0.0, float(seconds.mean() - row_s * rows.mean()))
        return best_size(values[: room - 1], fixed_s, row_s)


def best_size(values: Sequence[float], fixed_s: float, row_s: float) -> int:
    """Return the tree size, root included, that promises most tokens a second.

    ``values``: log-probabilities of the candidates' paths, best first. EAGLE-2's are calibrated (arXiv 2406.16858,
    section 3.2): the best c of them yield about 1 + sum(exp(values[:c])) tokens a step, which costs ``fixed_s`` and
    ``row_s`` for every row. Equally good sizes: the largest.
    """
    tokens, best, fastest = 1.0, 1, -math.inf
    for size in range(1, len(values) + 2):
        if size > 1:
            tokens += math.exp(values[size - 2])
        spent_s = fixed_s + size * row_s
        speed = tokens / spent_s if spent_s > 0 else tokens
        if speed >= fastest:
            best, fastest = size, speed
    return best
