"""Chooses a schedule by predicted time, and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from burst.errors import UserError
from burst.layouts.layout import Layout
from burst.planner.predict import Prediction, predict
from burst.planner.topology import Topology
from burst.schedules import NAMES, AttentionShape, Phase, schedule

TIE = 1.01  # predictions closer than this are one: the simpler schedule is taken
SIMPLEST = ("ring", "allgather", "burst", "double_ring", "usp", "ulysses")


@dataclass(frozen=True)
class Candidate:
    """One schedule on this topology: what travels, how long it takes; ``refusal``: why it cannot run."""

    name: str
    forward: Prediction | None
    backward: Prediction | None
    travels: tuple[str, ...]  # forward, and backward when there is one
    ulysses: int | None = None  # ranks that share tokens by heads, in usp
    refusal: UserError | None = field(default=None, compare=False)

    @property
    def refused(self) -> str:
        """Why it cannot run, in a few words; empty when it can."""
        return "" if self.refusal is None else self.refusal.message

    @property
    def ranks(self) -> int:
        """Number of ranks; 0 when refused."""
        return len(self.forward.work_s) if self.forward else 0

    @property
    def total_s(self) -> float:
        """Predicted seconds of all phases; infinite when refused."""
        phases = [p for p in (self.forward, self.backward) if p is not None]
        return sum(p.total_s for p in phases) if phases else float("inf")

    @property
    def exposed_s(self) -> float:
        """Predicted seconds that no work of the busiest rank hides."""
        return sum(p.exposed_s for p in (self.forward, self.backward) if p is not None)

    def row(self, ideal_s: float) -> dict[str, Any]:
        """Return the candidate as one line of the table and of the JSON document."""
        phases = [p for p in (self.forward, self.backward) if p is not None]
        if not phases:
            return {"schedule": self.name, "refused": self.refused}
        return {
            "schedule": self.name,
            "travels": list(self.travels),
            "ulysses": self.ulysses,
            "predicted_ms": self.total_s * 1e3,
            "exposed_ms": self.exposed_s * 1e3,
            "percent_of_ideal": 100 * ideal_s / self.total_s if self.total_s else 100.0,
            "imbalance": max(p.imbalance for p in phases),
            "intra_bytes": sum(p.sent_bytes.get("intra", 0) for p in phases),
            "inter_bytes": sum(p.sent_bytes.get("inter", 0) for p in phases),
            "messages": sum(p.messages for p in phases),
            "workspace_bytes": max(p.workspace_bytes for p in phases),
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
        """Say in one sentence why the chosen one was taken."""
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
        head = (
            "schedule",
            "travels",
            "ms",
            "exposed ms",
            "% ideal",
            "balance",
            "intra",
            "inter",
            "msgs",
            "buffers",
        )
        lines: list[Sequence[str]] = [head]
        for c in self.candidates:
            row = c.row(self.ideal_s)
            if c.forward is None:
                lines.append((c.name, f"cannot run: {c.refused}"))
                continue
            lines.append(
                (
                    c.name if c.ulysses is None else f"{c.name} {c.ulysses}x{c.ranks // c.ulysses}",
                    "/".join(c.travels),
                    f"{row['predicted_ms']:.3f}",
                    f"{row['exposed_ms']:.3f}",
                    f"{row['percent_of_ideal']:.1f}",
                    f"{row['imbalance']:.3f}",
                    _size(row["intra_bytes"]),
                    _size(row["inter_bytes"]),
                    str(row["messages"]),
                    _size(row["workspace_bytes"]),
                )
            )
        whole = [line for line in lines if len(line) == len(head)]
        widths = [max(len(line[i]) for line in whole) for i in range(len(head))]
        text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=False)).rstrip() for line in lines]
        return "\n".join([*text, self.reason()]) + "\n"


@lru_cache(maxsize=256)
def plan(
    layout: Layout,
    shape: AttentionShape,
    topology: Topology,
    *,
    causal: bool = True,
    window: int | None = None,
    keys: Layout | None = None,
    backward: bool = False,
    travels: tuple[str, str] = ("auto", "auto"),
    names: tuple[str, ...] = NAMES,
) -> Plan:
    """Predict every schedule (or those of ``names``), fastest first; near ties go to the simpler one.

    ``travels``, forward and backward, is each schedule's own choice unless given (``schedules.schedule``).
    The result depends on the arguments alone, so all ranks choose alike. Raises UserError when none can run.
    """
    wanted = travels if backward else travels[:1]
    found = [_candidate(n, layout, shape, topology, causal, window, keys, wanted) for n in names]
    best = min(c.total_s for c in found)
    why = min(found, key=lambda c: SIMPLEST.index(c.name)).refusal
    if best == float("inf") and why is not None:
        message = f"no schedule can run: {why.message}"
        raise UserError(message, given=why.given, allowed=why.allowed, remedy=why.remedy)
    close = [c for c in found if c.total_s <= best * TIE]
    chosen = min(close, key=lambda c: SIMPLEST.index(c.name))
    others = sorted((c for c in found if c is not chosen), key=lambda c: (c.total_s, c.name))
    return Plan((chosen, *others), _ideal_s(layout, keys, shape, topology, causal, window, backward))


def _candidate(
    name: str,
    layout: Layout,
    shape: AttentionShape,
    topology: Topology,
    causal: bool,
    window: int | None,
    keys: Layout | None,
    travels: Sequence[str],
) -> Candidate:
    """Predict one schedule; ``usp`` with the best number of ranks that share tokens by heads."""
    phases: tuple[Phase, ...] = ("forward", "backward")
    # More members than query heads would leave ranks idle; all ranks together are ulysses.
    shares = [u for u in range(2, min(layout.world, shape.q_heads + 1)) if layout.world % u == 0]
    best = Candidate(name, None, None, (), refusal=_no_groups(layout.world, shape.q_heads))
    for ulysses in shares if name == "usp" else [None]:
        try:
            made = [
                schedule(
                    name,
                    layout,
                    shape,
                    phase=phase,
                    nodes=topology.nodes,
                    causal=causal,
                    window=window,
                    keys=keys,
                    travels=wanted,
                    ulysses=ulysses,
                )
                for phase, wanted in zip(phases, travels, strict=False)
            ]
        except UserError as error:
            best = Candidate(name, None, None, (), refusal=error)
            continue
        timed = [predict(each, shape, topology) for each in made]
        chosen = tuple(each.travels for each in made)
        candidate = Candidate(name, timed[0], timed[1] if len(timed) > 1 else None, chosen, ulysses)
        if candidate.total_s < best.total_s:
            best = candidate
    return best


def _no_groups(ranks: int, q_heads: int) -> UserError:
    return UserError(
        "no number of ranks divides them into head groups",
        given=f"{ranks} ranks, {q_heads} query heads",
        allowed="a divisor of the ranks between 1 and all, at most the query heads",
        remedy="Use another schedule.",
    )


def _ideal_s(
    layout: Layout,
    keys: Layout | None,
    shape: AttentionShape,
    topology: Topology,
    causal: bool,
    window: int | None,
    backward: bool,
) -> float:
    """Seconds of all unmasked pairs spread evenly over the ranks, at the kernel's speed, nothing else."""
    ranks = range(layout.world)
    pairs = sum(layout.pairs(r, causal=causal, window=window, keys=keys) for r in ranks)
    d, dv = shape.head_dim, shape.value_dim
    each = 2 * (d + dv) + (2 * (3 * d + 2 * dv) if backward else 0)
    return each * shape.q_heads * shape.batch * pairs / topology.machine.flops / layout.world


def _size(count: int) -> str:
    """Write bytes for people, in powers of 1000."""
    value, unit = float(count), 0
    while value >= 1000 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{value:.4g} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"
