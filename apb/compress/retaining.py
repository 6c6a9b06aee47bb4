"""Retaining heads: a small trained network a layer says which tokens will be wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apb.compress.base import COMPRESSORS, Candidates, Compressor
from apb.compress.heads import find, head_input, load, on_device
from apb.compress.pool import check_window, max_pool
from apb.plan.shapes import ModelShape
from burst.registry import option


@COMPRESSORS.register(
    "retaining", "the tokens that trained heads choose (apb train retaining_heads); needs no question"
)
@dataclass(frozen=True)
class Retaining(Compressor):
    """Scores a token by a trained head that reads its query, key and value. Needs no question, and learns from one.

    Source: Locret (arXiv 2410.01805), section 3, as APB (arXiv 2502.12085) uses it.
    """

    needs_projections: ClassVar[bool] = True

    heads: str = option(
        "smollm2-135m",
        "shipped heads' name, or a file that every host can read: a published state dict, or of 'apb train'",
        text=True,
    )
    window: int | None = option(
        None, "neighbouring tokens that a score spreads over, by a max-pool; null: as the heads were trained"
    )

    def __post_init__(self) -> None:
        if self.window is not None:
            check_window(self.window)

    def check(self, shape: ModelShape) -> None:
        """Raise UserError unless the heads are there and belong to such a model."""
        load(find(self.heads)).check(shape)

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32; the heads run in the model's type."""
        assert block.projections is not None
        heads = load(find(self.heads))
        layers = on_device(heads, block.k_BKSD.device, block.k_BKSD.dtype)
        x_BSE = head_input(block.projections, block.keys_from_end() if heads.keys == "from_end" else None)
        scores_BKS = layers[block.layer](x_BSE).float().transpose(1, 2)
        return max_pool(scores_BKS, heads.window if self.window is None else self.window)
