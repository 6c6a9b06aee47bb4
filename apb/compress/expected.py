"""Expected attention: what queries like the block's own would look at if they stood behind the context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import COMPRESSORS, Candidates, Compressor
from burst.errors import in_range
from burst.registry import option

_SAMPLED = 16  # future positions that the mean rotation is taken over; it is smooth in the position


@COMPRESSORS.register(
    "expected", "the tokens that any later text is expected to attend to; needs no question and serves every one alike"
)
@dataclass(frozen=True)
class Expected(Compressor):
    """Scores a token by the attention that a future query is expected to pay to it, times the norm of its value.

    Queries before rotation are taken as normal, with the block's own mean and covariance; rotated to where later text
    will stand, the expectation of exp(q k) has a closed form. Knows nothing of any question, so a cache made with it
    serves every later question alike. Source: Expected Attention (arXiv 2510.00636), section 3.
    """

    future: int = option(64, "tokens behind the context over whose positions the rotation is averaged")

    def __post_init__(self) -> None:
        in_range("compress.future", self.future, self.future >= 1, "1 or more")

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32 (fp64 for fp64 models)."""
        exact = torch.float64 if block.k_BKSD.dtype == torch.float64 else torch.float32
        q_BHSD, k_BKSD = block.plain_queries().to(exact), block.k_BKSD.to(exact)
        n_kv, width = k_BKSD.shape[1], k_BKSD.shape[-1]
        group = q_BHSD.shape[1] // n_kv
        mean_BH1D = q_BHSD.mean(dim=2, keepdim=True)
        spread_BHSD = q_BHSD - mean_BH1D
        rotation_DD = self._rotation(block, width, exact)
        # A row vector x in the future is x @ rotation.
        ahead_BH1D = mean_BH1D @ rotation_DD
        covariance_BHDD = rotation_DD.T @ (spread_BHSD.transpose(-1, -2) @ spread_BHSD) @ rotation_DD / q_BHSD.shape[2]
        per_head = []
        for j in range(n_kv):
            heads, k_B1SD = slice(j * group, (j + 1) * group), k_BKSD[:, j : j + 1]
            mean_BGS = (k_B1SD @ ahead_BH1D[:, heads].transpose(-1, -2))[..., 0] * block.scale
            variance_BGS = ((k_B1SD @ covariance_BHDD[:, heads]) * k_B1SD).sum(dim=-1) * block.scale**2
            per_head.append((mean_BGS + variance_BGS / 2).softmax(dim=-1).mean(dim=1))
        norms_BKS: Tensor = torch.linalg.vector_norm(block.v_BKSD.to(exact), dim=-1)
        return torch.stack(per_head, dim=1) * norms_BKS

    def _rotation(self, block: Candidates, width: int, dtype: torch.dtype) -> Tensor:
        """Return the mean rotation (D, D) to the positions behind the context, found by rotating unit vectors."""
        device = block.k_BKSD.device
        ahead_J = torch.linspace(0, self.future - 1, min(self.future, _SAMPLED), device=device).round().long()
        units_11SD = torch.eye(width, dtype=dtype, device=device).repeat(len(ahead_J), 1)[None, None]
        rotated_11SD = block.rotate(units_11SD, (ahead_J + block.end).repeat_interleave(width))
        return rotated_11SD.view(len(ahead_J), width, width).mean(dim=0)
