"""Key norms: tokens with small keys tend to be attended to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import COMPRESSORS, Candidates, Compressor


@COMPRESSORS.register("norm", "the keys of smallest norm; needs no question")
@dataclass(frozen=True)
class Norm(Compressor):
    """Keeps the keys of smallest L2 norm; knows nothing of the question. Source: arXiv 2406.11430."""

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32."""
        norms: Tensor = torch.linalg.vector_norm(block.k_BKSD.float(), dim=-1)
        return -norms
