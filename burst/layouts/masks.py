"""The mask of a (query rank, source rank) pair as data: rectangles that a kernel knows, full or causal.

Within one document a rank holds spans of positions with one step. Two spans of equal step see each other
along a diagonal band ``lo <= j - i <= hi`` (row i, column j) in every layout. A band is tiled into rectangles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Span:
    """Tokens of one document, neighbours in a rank's local order, ``step`` positions apart."""

    start: int  # position of the first token in the whole (packed) sequence
    count: int  # tokens, 1 or more
    step: int  # positions between neighbours: 1, or the number of ranks when striped
    document: int  # index into cu_seqlens; tokens of different documents never see each other
    offset: int  # row of the first token in the rank's local order

    @property
    def stop(self) -> int:
        """The position after the last token's."""
        return self.start + (self.count - 1) * self.step + 1


class MaskPiece(NamedTuple):
    """One kernel call: query rows ``q`` of the query rank attend to key rows ``k`` of the source rank.

    Rows count in each rank's local order. ``causal``: the piece is square and row i sees columns 0..i.
    ``flip`` (only with ``causal``): row i sees columns i.. instead; run the causal kernel on q, k and v
    reversed along the tokens and reverse what comes out (out and lse, or dq, dk and dv).
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool = False
    flip: bool = False

    @property
    def q(self) -> slice:
        """Rows of the query rank's local order."""
        return slice(self.q_start, self.q_stop)

    @property
    def k(self) -> slice:
        """Rows of the source rank's local order."""
        return slice(self.k_start, self.k_stop)

    @property
    def pairs(self) -> int:
        """Unmasked query-key pairs; one costs 2 (d + dv) FLOPs a query head in the forward."""
        rows = self.q_stop - self.q_start
        return rows * (rows + 1) // 2 if self.causal else rows * (self.k_stop - self.k_start)

    def over(self, start: int, stop: int) -> Iterator[MaskPiece]:
        """Yield the piece's part over the key rows [start, stop), whose rows then count from ``start``."""
        first, last = max(self.k_start, start), min(self.k_stop, stop)
        if first >= last:
            return
        keys = first - start, last - start
        if not self.causal:
            yield MaskPiece(self.q_start, self.q_stop, *keys)
            return
        top, bottom = (self.q_start + k - self.k_start for k in (first, last))  # the rows on the diagonal
        yield MaskPiece(top, bottom, *keys, causal=last - first > 1, flip=self.flip and last - first > 1)
        rest = (self.q_start, top) if self.flip else (bottom, self.q_stop)
        if rest[0] < rest[1]:
            yield MaskPiece(*rest, *keys)


def pieces(
    q_spans: Iterable[Span], k_spans: Iterable[Span], *, causal: bool, window: int | None
) -> tuple[MaskPiece, ...]:
    """Compose the mask between two ranks' spans; every unmasked pair is in exactly one piece.

    ``window`` keys are seen by a causal query, itself included; without ``causal`` it sees keys closer than
    ``window``. A window of fewer positions than the step (striped) leaves single diagonals, and so one piece
    a token.
    """
    keys: defaultdict[int, list[Span]] = defaultdict(list)
    for span in k_spans:
        keys[span.document].append(span)
    by_document: defaultdict[int, list[MaskPiece]] = defaultdict(list)
    for q in q_spans:
        for k in keys[q.document]:
            by_document[q.document] += _between(q, k, causal, window)
    return tuple(sorted(p for parts in by_document.values() for p in _coalesce(parts)))


def _between(q: Span, k: Span, causal: bool, window: int | None) -> Iterator[MaskPiece]:
    step = q.step if q.count > 1 else k.step
    assert k.step == step or k.count == 1, "spans of one layout share their step"
    lead = q.start - k.start
    lo, hi = -q.count, k.count  # no edge at all
    if causal:
        hi = lead // step
    elif window is not None:
        hi = (lead + window - 1) // step
    if window is not None:
        lo = -((window - 1 - lead) // step)
    for p in _band(q.count, k.count, lo, hi):
        yield MaskPiece(
            p.q_start + q.offset, p.q_stop + q.offset, p.k_start + k.offset, p.k_stop + k.offset, p.causal, p.flip
        )


def _band(rows: int, cols: int, lo: int, hi: int) -> Iterator[MaskPiece]:
    """Tile ``lo <= j - i <= hi``: rows without an old edge, rows with both edges, rows without a new edge."""
    first, last = max(0, -hi), min(rows, cols - lo)  # rows that see anything
    if lo > hi or first >= last:
        return
    edged = min(last, max(first, 1 - lo))  # from here on the first column is out of sight
    late = min(last, max(edged, cols - 1 - hi))  # from here on the last column is in sight
    yield from _below(first, edged, 0, cols, hi)
    height = hi - lo + 1  # in so many rows no column meets both edges
    for top in range(edged, late, height):
        bottom = min(late, top + height)
        yield from _above(top, bottom, 0, bottom + lo, lo)
        yield from _below(top, bottom, bottom + lo, cols, hi)
    yield from _above(late, last, 0, cols, lo)


def _below(top: int, bottom: int, left: int, right: int, diagonal: int) -> Iterator[MaskPiece]:
    """Tile ``j <= i + diagonal``: columns seen by all rows, a square, then rows that see all columns."""
    top = max(top, left - diagonal)
    if top >= bottom or left >= right:
        return
    corner = min(right, top + diagonal)  # the first row sees up to this column
    if corner > left:
        yield MaskPiece(top, bottom, left, corner)
    side = min(bottom - top, right - corner)
    if side > 0:
        yield MaskPiece(top, top + side, corner, corner + side, causal=side > 1)
        if top + side < bottom:
            yield MaskPiece(top + side, bottom, corner, right)


def _above(top: int, bottom: int, left: int, right: int, diagonal: int) -> Iterator[MaskPiece]:
    """Tile ``j >= i + diagonal``: the mirror image of ``_below``, its squares flipped."""
    for p in _below(-bottom, -top, -right, -left, -diagonal):
        yield MaskPiece(-p.q_stop, -p.q_start, -p.k_stop, -p.k_start, p.causal, flip=p.causal)


def _coalesce(parts: Sequence[MaskPiece]) -> list[MaskPiece]:
    """Join neighbours: two squares and the rectangle between them, then rectangles side by side."""
    full = {p for p in parts if not p.causal}
    squares: list[MaskPiece] = []
    for p in sorted(p for p in parts if p.causal or p.q_stop - p.q_start == p.k_stop - p.k_start == 1):
        if squares and not p.flip and not squares[-1].flip:
            last = squares[-1]
            between = MaskPiece(p.q_start, p.q_stop, last.k_start, last.k_stop)
            if last.q_stop == p.q_start and last.k_stop == p.k_start and between in full:
                full -= {between, p, last}
                squares[-1] = MaskPiece(last.q_start, p.q_stop, last.k_start, p.k_stop, causal=True)
                continue
        squares.append(p)
    rows = _join(sorted(full, key=lambda p: (p.k_start, p.k_stop, p.q_start)), by_rows=True)
    whole = _join(sorted(rows, key=lambda p: (p.q_start, p.q_stop, p.k_start)), by_rows=False)
    return [*whole, *(p for p in squares if p.causal)]


def _join(ordered: Iterable[MaskPiece], by_rows: bool) -> list[MaskPiece]:
    out: list[MaskPiece] = []
    for p in ordered:
        if out and by_rows and out[-1][2:] == p[2:] and out[-1].q_stop == p.q_start:
            out[-1] = out[-1]._replace(q_stop=p.q_stop)
        elif out and not by_rows and out[-1][:2] == p[:2] and out[-1].k_stop == p.k_start:
            out[-1] = out[-1]._replace(k_stop=p.k_stop)
        else:
            out.append(p)
    return out
