"""Recency: the end of every block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import COMPRESSORS, Candidates, Compressor


@COMPRESSORS.register("recent", "the last tokens of every block")
@dataclass(frozen=True)
class Recent(Compressor):
    """Keeps the last tokens of the block."""

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32."""
        k_BKSD = block.k_BKSD
        positions = torch.arange(k_BKSD.shape[2], device=k_BKSD.device, dtype=torch.float32)
        return positions.expand(k_BKSD.shape[:-1])
