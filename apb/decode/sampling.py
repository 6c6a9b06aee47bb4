"""Sampling: the next token from logits, greedy or by a random number that depends on seed and position alone."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from burst.errors import in_range
from burst.registry import option


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep everything. Raises UserError out of range."""

    temperature: float = option(0.0, "0 always takes the likeliest token")
    top_p: float = option(1.0, "sample from the likeliest tokens of this probability together; 1 is off")
    top_k: int = option(0, "sample from this many likeliest tokens; 0 is off")
    seed: int = option(0, "same seed, same answer")

    def __post_init__(self) -> None:
        checks = [
            ("temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, up to 1"),
            ("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "whole: 0 (off) or more"),
            ("seed", self.seed, isinstance(self.seed, int) and 0 <= self.seed < 2**64, "whole: 0 to 2**64 - 1"),
        ]
        for name, value, fine, allowed in checks:
            in_range(f"decode.{name}", value, fine, allowed)

    def choose(self, logits_V: Tensor, position: int) -> int:
        """Return the token at ``position``.

        The random number comes from a counter (Philox keyed by the seed, counted by the position), so that another way
        of decoding that asks for the same position gets the same token.
        """
        if self.temperature == 0.0:
            return int(logits_V.argmax())
        probs_V = self.probabilities(logits_V)
        cumulative_V = probs_V.cumsum(0)
        index = int(torch.searchsorted(cumulative_V, self.uniform(position) * float(cumulative_V[-1]), right=True))
        last = int(probs_V.nonzero()[-1])
        return min(index, last)  # rounding in the sum must not choose a token of probability zero

    def uniform(self, position: int) -> float:
        """Return the random number, 0 up to 1, that decides the token at ``position``."""
        return float(np.random.Generator(np.random.Philox(key=self.seed, counter=[position, 0, 0, 0])).random())

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """Return the sampling distribution (V,), fp64: temperature, then top-k, then top-p."""
        logits_V = logits_V.double()
        # Below the largest logit nothing overflows but to -inf, and 1 / temperature itself stays finite.
        logits_V = (logits_V - logits_V.max()) / max(self.temperature, sys.float_info.min)
        if 0 < self.top_k < logits_V.numel():
            least = logits_V.topk(self.top_k).values[-1]
            logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
        probs_V = logits_V.softmax(0)
        if self.top_p < 1.0:
            sorted_V, order_V = probs_V.sort(descending=True, stable=True)
            before_V = sorted_V.cumsum(0) - sorted_V
            probs_V = probs_V.index_fill(0, order_V[before_V >= self.top_p], 0.0)  # the token that crosses top_p stays
            probs_V = probs_V / probs_V.sum()
        return probs_V
