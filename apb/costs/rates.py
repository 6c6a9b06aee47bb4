"""Rates of a host's device: measured (``apb bench kernels``) or given, from a JSON file; or assumed."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from burst.errors import UserError, choose
from burst.planner.topology import MACHINES

Curve = tuple[tuple[float, float], ...]  # (tokens, rate) ascending by tokens

# Bytes that a token moves outside matrix products and attention, in elements of a layer's widths: norms in fp32 and
# residual sums; the MLP's activation and product; rotations, kept copies and transposed outputs.
PASSES_HIDDEN, PASSES_MLP, PASSES_HEADS = 22, 5, 12


@dataclass(frozen=True)
class Rates:
    """Rates of one device and number type; curves are read between their points on a logarithmic scale of tokens.

    ``linear``: FLOP/s of projections by tokens; ``causal`` and ``full``: FLOP/s of attention calls by keys, of causal
    ones only unmasked pairs counted; ``memory``: bytes a second, read and written; ``select``: tokens times kv heads a
    second that a compressor scores and gathers; ``call_s``: seconds a kernel call costs beside its work; ``rest_s``:
    seconds a token and layer of everything else, None: by its bytes.
    """

    name: str
    linear: Curve
    causal: Curve
    full: Curve
    memory: float
    select: float
    call_s: float = 0.0
    rest_s: float | None = None

    def save(self, path: Path, **about: Any) -> None:
        """Write the rates and what is to be said about them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**about, "rates": asdict(self)}, indent=1) + "\n", encoding="utf-8")


def read(curve: Curve, tokens: float) -> float:
    """Interpolate a curve over the logarithm of tokens."""
    at = bisect_left(curve, tokens, key=lambda point: point[0])
    if at == 0 or at == len(curve):
        return curve[min(at, len(curve) - 1)][1]
    (a, low), (b, high) = curve[at - 1], curve[at]
    share = math.log(tokens / a) / math.log(b / a)
    return low + share * (high - low)


def assumed(machine: str) -> Rates:
    """Return the rates assumed for ``cpu`` or ``cuda``: one for products and attention of any size."""
    found = MACHINES[choose("machine", machine, MACHINES)]
    flat = ((1.0, found.flops),)
    # A scored token reads its key about twice and is sorted: some hundred bytes of traffic each.
    return Rates(f"assumed for {machine}", flat, flat, flat, found.memory, found.memory / 1000, found.call)


def load(path: Path) -> Rates:
    """Read what ``save`` wrote; raises UserError for files that hold no rates."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["rates"]
        made = Rates(**{f.name: _value(values[f.name]) for f in fields(Rates)})
        positive = [made.memory, made.select, *(x for c in (made.linear, made.causal, made.full) for p in c for x in p)]
        if not all(math.isfinite(x) and x > 0 for x in positive) or not (made.linear and made.causal and made.full):
            raise ValueError("rates must be above 0")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the rates in {path} cannot be read: {type(error).__name__}: {error}",
            given=str(path),
            allowed="a file that 'apb bench kernels' wrote",
            remedy="Run 'apb bench kernels out=DIR' and give DIR/rates.json.",
        ) from error
    return made


def _value(given: Any) -> Any:
    return tuple((float(a), float(b)) for a, b in given) if isinstance(given, list) else given


def curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Return the points in order of tokens."""
    return tuple(sorted(points))
