"""Schedules with their predicted times, as a table for people and as a JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from burst.errors import UserError
from burst.planner.predict import Prediction

TIE = 1.01  # predictions closer than this are one: the simpler schedule is taken


@dataclass(frozen=True)
class Candidate:
    """One schedule on this topology: its travellers and times, or why it cannot run (``rejection``)."""

    name: str
    forward: Prediction | None
    backward: Prediction | None
    travels: tuple[str, ...]  # forward, and backward when there is one
    ulysses: int | None = None  # ranks that share tokens by heads, in usp
    rejection: UserError | None = field(default=None, compare=False)

    @property
    def rejected(self) -> str:
        """The reason for which it cannot run, in a few words; empty when it can."""
        return "" if self.rejection is None else self.rejection.message

    @property
    def phases(self) -> tuple[Prediction, ...]:
        """The predictions that there are: none when rejected."""
        return tuple(p for p in (self.forward, self.backward) if p is not None)

    @property
    def ranks(self) -> int:
        """Number of ranks; 0 when rejected."""
        return len(self.forward.work_s) if self.forward else 0

    @property
    def total_s(self) -> float:
        """Predicted seconds of all phases; infinite when rejected."""
        return sum(p.total_s for p in self.phases) if self.phases else float("inf")

    @property
    def exposed_s(self) -> float:
        """Predicted seconds that no work of the busiest rank hides."""
        return sum(p.exposed_s for p in self.phases)

    def row(self, ideal_s: float) -> dict[str, Any]:
        """Return the candidate as one line of the table and of the JSON document."""
        if not self.phases:
            return {"schedule": self.name, "refused": self.rejected}
        return {
            "schedule": self.name,
            "travels": list(self.travels),
            "ulysses": self.ulysses,
            "predicted_ms": self.total_s * 1e3,
            "exposed_ms": self.exposed_s * 1e3,
            "percent_of_ideal": 100 * ideal_s / self.total_s if self.total_s else 100.0,
            "imbalance": max(p.imbalance for p in self.phases),
            "intra_bytes": sum(p.sent_bytes.get("intra", 0) for p in self.phases),
            "inter_bytes": sum(p.sent_bytes.get("inter", 0) for p in self.phases),
            "messages": sum(p.messages for p in self.phases),
            "workspace_bytes": max(p.workspace_bytes for p in self.phases),
        }


@dataclass(frozen=True)
class Plan:
    """All candidates, the chosen one first, and the time of evenly spread work without any communication."""

    candidates: tuple[Candidate, ...]
    ideal_s: float

    @property
    def chosen(self) -> Candidate:
        """The candidate to run."""
        return self.candidates[0]

    def reason(self) -> str:
        """Return the reason for the choice, one sentence."""
        best = self.chosen
        others = [c for c in self.candidates[1:] if c.forward is not None]
        exposed = f"{best.exposed_s * 1e3:.3f} ms of {best.total_s * 1e3:.3f} ms are not hidden behind work"
        if not others:
            return f"{best.name}: the only schedule that can run here; {exposed}."
        second = others[0]
        if second.total_s <= best.total_s * TIE:
            return f"{best.name}: within {TIE - 1:.0%} of {second.name} and simpler; {exposed}."
        gain = (second.total_s / best.total_s - 1) * 100
        return f"{best.name}: {gain:.0f} % faster than {second.name}, the next best; {exposed}."

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as the JSON document shows it."""
        return {
            "schedule": self.chosen.name,
            "travels": list(self.chosen.travels),
            "ulysses": self.chosen.ulysses,
            "reason": self.reason(),
            "ideal_ms": self.ideal_s * 1e3,
            "candidates": [c.row(self.ideal_s) for c in self.candidates],
        }

    def table(self) -> str:
        """Return the candidates as text for people."""
        head = ("schedule", "travels", "ms", "exposed ms", "% ideal", "balance", "intra", "inter", "msgs", "buffers")
        lines: list[Sequence[str]] = [head]
        for c in self.candidates:
            row = c.row(self.ideal_s)
            if c.forward is None:
                lines.append((c.name, f"cannot run: {c.rejected}"))
                continue
            name = c.name if c.ulysses is None else f"{c.name} {c.ulysses}x{c.ranks // c.ulysses}"
            times = f"{row['predicted_ms']:.3f}", f"{row['exposed_ms']:.3f}"
            shares = f"{row['percent_of_ideal']:.1f}", f"{row['imbalance']:.3f}"
            links = _size(row["intra_bytes"]), _size(row["inter_bytes"])
            rest = str(row["messages"]), _size(row["workspace_bytes"])
            lines.append((name, "/".join(c.travels), *times, *shares, *links, *rest))
        whole = [line for line in lines if len(line) == len(head)]
        widths = [max(len(line[i]) for line in whole) for i in range(len(head))]
        text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=False)).rstrip() for line in lines]
        return "\n".join([*text, self.reason()]) + "\n"


def _size(count: int) -> str:
    """Write bytes for people, in powers of 1000."""
    value, unit = float(count), 0
    while value >= 1000 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{value:.4g} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"
