"""Watching over hosts: each beats, and one that falls silent or stands still for too long is lost."""

from __future__ import annotations

import time
from collections.abc import Collection

# A host that waits for a peer has the same deadline there and says so itself: it is given this much longer.
MARGIN_S = 4.0
# Between two looks; if more time passed, this process itself was stopped, and knows nothing of the hosts.
ATTENTION_S = 3.0


def beat_s(timeout_s: float) -> float:
    """Return the pause between two beats of a host."""
    return min(1.0, timeout_s / 5)


class Vigil:
    """Signs of the hosts' lives during a call; each may be silent for ``timeout_s`` seconds."""

    def __init__(self, ranks: Collection[int], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        now = time.monotonic()
        self._heard = dict.fromkeys(ranks, now)
        self._idle = dict.fromkeys(ranks, 0.0)
        self._looked = now

    def heard(self, rank: int, idle_s: float = 0.0) -> None:
        """Note a sign of life, and for how long the host's work has stood still."""
        self._heard[rank], self._idle[rank] = time.monotonic(), idle_s

    def lost(self, ranks: Collection[int]) -> dict[int, str]:
        """Return which of ``ranks`` are lost, and what is the matter with each."""
        now = time.monotonic()
        if now - self._looked > ATTENTION_S:
            away = now - self._looked
            self._heard = {rank: at + away for rank, at in self._heard.items()}
        self._looked = now
        found = {}
        for rank in sorted(ranks):
            silent_s, still_s = now - self._heard[rank], self._idle[rank]
            if silent_s > self.timeout_s:
                found[rank] = f"it has not answered for {silent_s:.0f} s: its process is stopped, or cut off"
            elif still_s > self.timeout_s + MARGIN_S:
                found[rank] = f"it answers, but its work has stood still for {still_s:.0f} s"
        return found
