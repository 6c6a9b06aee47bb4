"""Results: the answers that users get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """An answer: its text (stop token and stop string left out), its token ids, and what everything cost."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    metrics: dict[str, Any]
