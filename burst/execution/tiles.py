"""Equal pieces of a mask at equal distances, as the tiles of a window are: one kernel call for all of them.

Shapes: B batch, H heads, N tiles, S rows of a tile, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor
from torch.nn.functional import pad

from burst.layouts.masks import MaskPiece

TOKENS = 2


@dataclass(frozen=True)
class Tiles:
    """``count`` pieces like ``first``, each ``q_step`` queries and ``k_step`` keys after the one before."""

    first: MaskPiece
    count: int = 1
    q_step: int = 0
    k_step: int = 0

    @property
    def q(self) -> slice:
        """Rows from the first tile's first query to the last tile's last one."""
        return slice(self.first.q_start, self.first.q_stop + (self.count - 1) * self.q_step)

    def cut(self, x_BHSD: Tensor, *, keys: bool) -> Tensor:
        """Return the tiles' rows (B * N, H, S, D), without copying where B is 1."""
        p = self.first
        start, stop, step = (p.k_start, p.k_stop, self.k_step) if keys else (p.q_start, p.q_stop, self.q_step)
        if self.count == 1:
            return x_BHSD[:, :, start:stop]
        whole = x_BHSD[:, :, start : stop + (self.count - 1) * step]
        return whole.unfold(TOKENS, stop - start, step).permute(0, 2, 1, 4, 3).flatten(0, 1)

    def joined(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tiles' out (B, H, S, D) and lse (B, H, S) as rows side by side; rows between tiles are empty."""
        if self.count == 1:
            return out, lse
        gap = self.q_step - (self.first.q_stop - self.first.q_start)
        if gap:
            out, lse = pad(out, (0, 0, 0, gap)), pad(lse, (0, gap), value=-math.inf)
        rows = self.q.stop - self.q.start
        out, lse = (x.unflatten(0, (-1, self.count)).transpose(1, 2).flatten(2, 3) for x in (out, lse))
        return out[:, :, :rows], lse[:, :, :rows]


@lru_cache(maxsize=1024)
def tiled(pieces: tuple[MaskPiece, ...]) -> tuple[Tiles, ...]:
    """Return the pieces as tiles: those of one form, in a row and equally far apart, together."""
    out: list[Tiles] = []
    open_: dict[tuple[int, int, bool, bool], Tiles] = {}
    for piece in pieces:
        form = (piece.q_stop - piece.q_start, piece.k_stop - piece.k_start, piece.causal, piece.flip)
        run = open_.get(form)
        longer = None if run is None else _longer(run, piece)
        if longer is None:
            if run is not None:
                out.append(run)
            longer = Tiles(piece)
        open_[form] = longer
    return tuple(sorted((*out, *open_.values()), key=lambda tiles: tiles.first))


def _longer(run: Tiles, piece: MaskPiece) -> Tiles | None:
    """Return the run with one piece more; None where it stands elsewhere."""
    last_q = run.first.q_start + (run.count - 1) * run.q_step
    last_k = run.first.k_start + (run.count - 1) * run.k_step
    q_step, k_step = piece.q_start - last_q, piece.k_start - last_k
    apart = q_step >= piece.q_stop - piece.q_start and k_step > 0
    if not apart or (run.count > 1 and (q_step, k_step) != (run.q_step, run.k_step)):
        return None
    return Tiles(run.first, run.count + 1, q_step, k_step)
