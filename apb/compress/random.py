"""Random selection: the floor that every compressor must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import COMPRESSORS, Candidates, Compressor
from burst.registry import option


@COMPRESSORS.register("random", "a random choice, as a floor")
@dataclass(frozen=True)
class Random(Compressor):
    """Scores tokens at random, alike on every cluster for the same ``seed``."""

    seed: int = option(0, "same seed, same choice")

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32."""
        number = (self.seed * 1_000_003 + block.layer) * 1_000_003 + block.rank
        generator = torch.Generator().manual_seed(number % 2**63)
        shape = block.k_BKSD.shape[:-1]
        return torch.rand(shape, generator=generator).to(block.k_BKSD.device)
