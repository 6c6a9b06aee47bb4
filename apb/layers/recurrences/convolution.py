"""The short causal convolution in front of a recurrence, over a stretch, over new tokens and over a tree.

A row's output needs its own column and those of the ``kernel`` - 1 rows before it. All goes through the model's own
function, which starts at zeros.

Shapes: B batch (1), C channels, S columns, R reach (kernel - 1), M rows of a tree, W kernel width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Convolve = Callable[[Tensor], Tensor]  # (B, C, S) to (B, C, S)


def behind(before_BCR: Tensor | None, x_BCS: Tensor, convolve: Convolve) -> Tensor:
    """Return the outputs (B, C, S) of columns that stand behind others; None: at the start of the sequence."""
    if before_BCR is None:
        return convolve(x_BCS)
    return convolve(torch.cat([before_BCR, x_BCS], dim=-1))[:, :, before_BCR.shape[-1] :]


def over_tree(tail_BCR: Tensor, x_BCM: Tensor, columns_MW: Tensor, convolve: Convolve) -> Tensor:
    """Return the outputs (B, C, M) of a tree's rows, each a sequence of its own inputs by ``columns``."""
    all_CT = torch.cat([tail_BCR, x_BCM], dim=-1)[0]
    own_MCW = all_CT[:, columns_MW].transpose(0, 1).contiguous()
    return convolve(own_MCW)[:, :, -1].T[None]


def columns(parents: Sequence[int], kernel: int) -> list[list[int]]:
    """Return where each row's inputs stand among tail (``kernel`` - 1 columns) and rows: its ancestors', then its own.

    ``parents``: of each row, -1 for one that stands right behind the tail.
    """
    reach = kernel - 1
    chains = [list(range(reach))]  # the last inputs on the way to a row; first those of the tail
    for row, parent in enumerate(parents):
        assert parent < row, (parent, row)
        chains.append([*chains[parent + 1], reach + row][-kernel:])
    return chains[1:]


def tail(before_BCR: Tensor, x_BCS: Tensor) -> Tensor:
    """Return the last R columns of what stands before and new ones, a copy."""
    joined = torch.cat([before_BCR, x_BCS], dim=-1)
    return joined[:, :, joined.shape[-1] - before_BCR.shape[-1] :].clone()
