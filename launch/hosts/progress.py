"""Signs that a host's work goes on, read by a thread beside it. Imports nothing heavy: it is there before torch is."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Shares of a core and page-ins by which computing and reading files differ from the beats themselves.
BUSY_SHARE = 0.05
READS_PER_S = 5.0


class Progress:
    """Tells slow work from work that stands still: by its steps, and by what the process computes and reads.

    Work that computes for ever is taken for slow.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._busy = False
        self._seen = self._now()
        self._moved = time.monotonic()

    def step(self, *_: object) -> None:
        """Note a layer, a token or a message; serves as a transport's observer."""
        self._steps += 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time inside as work: outside of it nothing is expected to move."""
        self._moved, self._busy = time.monotonic(), True
        try:
            yield
        finally:
            self._busy = False

    def idle_s(self) -> float:
        """Return for how many seconds the work under way has shown no sign; 0 without any. For one thread only."""
        steps, computed_s, reads, at = seen = self._now()
        before = self._seen
        elapsed = at - before[3]
        if (
            not self._busy
            or steps != before[0]
            or computed_s - before[1] > BUSY_SHARE * elapsed
            or reads - before[2] > READS_PER_S * elapsed
        ):
            self._moved = at
        self._seen = seen
        return at - self._moved

    def _now(self) -> tuple[int, float, int, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        reads = used.ru_majflt + used.ru_inblock
        return self._steps, used.ru_utime + used.ru_stime, reads, time.monotonic()
