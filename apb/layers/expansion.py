"""The matrix that makes a layer's keys and values of its latents, and the two ways to attend to latents with it.

Expanded, for many queries: keys and values by head, the rotated part of the keys shared by all. Absorbed, for few: the
queries are multiplied into the latents' space, latents are keys and values of one head, and what comes out is
multiplied into the values' space. Both are the same numbers but for rounding. Source: DeepSeek-V2 (arXiv 2405.04434).

Shapes: B batch (1), H query heads, S queries, T latents, R width of a latent, P of its rotated part, N of a key's other
part, D = N + P, E value dim, X = N + E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Expansion:
    """``weight_HXR``: each head's rows for the keys' unrotated part, then those for its values."""

    weight_HXR: Tensor
    nope: int  # N

    @property
    def value_dim(self) -> int:
        """E."""
        return self.weight_HXR.shape[1] - self.nope

    def of(self, heads: slice) -> Expansion:
        """Return the expansion to some of the heads."""
        return Expansion(self.weight_HXR[heads], self.nope)

    def expand(self, latent_B1TR: Tensor, rotated_B1TP: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (B, H, T, D), the unrotated part first, and values (B, H, T, E)."""
        heads, width, _ = self.weight_HXR.shape
        made_BTHX = linear(latent_B1TR[:, 0], self.weight_HXR.flatten(0, 1)).unflatten(-1, (heads, width))
        nope_BHTN, v_BHTE = made_BTHX.transpose(1, 2).split([self.nope, self.value_dim], dim=-1)
        return torch.cat([nope_BHTN, rotated_B1TP.expand(-1, heads, -1, -1)], dim=-1), v_BHTE

    def absorb(self, q_BHSD: Tensor) -> Tensor:
        """Return the queries (B, H, S, R + P) whose products with [latent | rotated part] are those with the keys."""
        nope_BHSN, rotated_BHSP = q_BHSD.split([self.nope, q_BHSD.shape[-1] - self.nope], dim=-1)
        return torch.cat([nope_BHSN @ self.weight_HXR[:, : self.nope], rotated_BHSP], dim=-1)

    def values(self, out_BHSR: Tensor) -> Tensor:
        """Return the output (B, H, S, E) of attention whose values were latents."""
        return out_BHSR @ self.weight_HXR[:, self.nope :].mT
