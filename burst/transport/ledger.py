"""Byte ledger: bytes really sent, added up inside the transports' send calls."""

from __future__ import annotations

import threading
from collections import Counter

from torch import Tensor


class Ledger:
    """Bytes and messages that one rank has sent, by kind (their purpose) and link class (intra, inter).

    It never sees a plan: a difference between the two is a defect in one of them.
    """

    def __init__(self) -> None:
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._messages: Counter[str] = Counter()
        self._lock = threading.Lock()  # forwarding threads send as well

    def add(self, kind: str, link: str, tensor: Tensor) -> None:
        """Book one sent tensor."""
        with self._lock:
            self._bytes[kind, link] += tensor.numel() * tensor.element_size()
            self._messages[kind] += 1

    def entries(self) -> dict[tuple[str, str], int]:
        """Return bytes sent so far, by (kind, link class)."""
        with self._lock:
            return dict(self._bytes)

    def messages(self) -> dict[str, int]:
        """Return the number of messages sent so far, by kind."""
        with self._lock:
            return dict(self._messages)

    def by_kind(self) -> dict[str, int]:
        """Return bytes sent so far, by kind."""
        return self._sum(0)

    def by_link(self) -> dict[str, int]:
        """Return bytes sent so far, by link class."""
        return self._sum(1)

    def _sum(self, index: int) -> dict[str, int]:
        out: Counter[str] = Counter()
        with self._lock:
            for key, count in self._bytes.items():
                out[key[index]] += count
        return dict(out)
