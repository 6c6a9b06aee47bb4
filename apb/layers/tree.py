"""Draft trees by their rows' parents: depths, and which rows each row sees.

Shapes: M tree rows; row 0 is the root, and each row's parent stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROOT = -1  # parent of row 0


def depths(parents: Sequence[int]) -> tuple[int, ...]:
    """Return each row's steps from the root."""
    out: list[int] = []
    for parent in parents:
        out.append(0 if parent == ROOT else out[parent] + 1)
    return tuple(out)


def visible(parents: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return (M, M) bool: which rows each row sees, itself and its ancestors."""
    mask_MM = torch.eye(len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent != ROOT:
            mask_MM[row] |= mask_MM[parent]
    return mask_MM.to(device)
