"""Compressors: scores for a block's tokens, of which the highest are passed on.

Shapes: B batch, H query heads, K kv heads, S block tokens, Q question tokens, D head dim, E projection width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apb.layers.full import Full
from apb.layers.rows import Projections
from apb.plan.shapes import ModelShape
from burst.errors import UserError
from burst.registry import Registry

# Queries or keys (B, heads, S, D), and the positions to turn them on by: one number, or one a token.
Rotate = Callable[[Tensor, int | Tensor], Tensor]


@dataclass(frozen=True)
class Candidates:
    """A block's tokens in one layer, as a compressor sees them; keys and queries carry their true positions."""

    layer: int
    rank: int  # the block's number in position order: the host's rank where each host holds one
    q_BHSD: Tensor
    k_BKSD: Tensor
    v_BKSD: Tensor
    scale: float
    question_q_BHQD: Tensor | None  # the question's queries, rotated to where the question really stands
    projections: Projections | None  # only for compressors that set ``needs_projections``
    start: int  # the first token's position
    end: int  # the context's length: where what comes after it stands
    rotate: Rotate  # turns this layer's queries or keys on by positions

    def keys_from_end(self) -> Tensor:
        """Return the keys (B, K, S, D) as a query without rotation meets them from the context's end."""
        return self.rotate(self.k_BKSD, -self.end)

    def plain_queries(self) -> Tensor:
        """Return the queries (B, H, S, D) without their rotation."""
        positions_S = torch.arange(self.q_BHSD.shape[2], device=self.q_BHSD.device) + self.start
        return self.rotate(self.q_BHSD, -positions_S)


@dataclass(frozen=True)
class Compressor(ABC):
    """Scores a block's tokens per kv head; its fields are its options."""

    name: ClassVar[str]
    needs_question: ClassVar[bool] = False
    needs_projections: ClassVar[bool] = False

    def check(self, shape: ModelShape) -> None:  # noqa: B027 - most fit every model
        """Raise UserError unless the compressor fits a model of ``shape``; see ``check_fits``."""

    @abstractmethod
    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32; higher is kept."""


def check_fits(by: Compressor, shape: ModelShape) -> None:
    """Raise UserError unless the compressor fits a model of ``shape``; called before weights are loaded."""
    others = sorted({kind.name for kind in shape.sharded if not isinstance(kind, Full)})
    if by.needs_projections and others:
        raise UserError(
            f"compressor '{by.name}' reads raw projections of queries, keys and values, which {others[0]} layers lack",
            given=f"compress={by.name} on a model with {others[0]} layers",
            allowed="models whose sharded layers are full attention",
            remedy="Choose compress=norm, recent, snapkv or expected, or query where the prompt has a question.",
        )
    by.check(shape)


def check_scores(by: Compressor, scores: object, keys_BKSD: Tensor) -> None:
    """Reject scores that are not one real number a token and kv head; raises UserError.

    Of values on a GPU, which cannot be read without a wait, the device itself stops at what is no number.
    """
    wanted = keys_BKSD.shape[:-1]
    if not isinstance(scores, Tensor) or scores.shape != wanted or scores.is_complex():
        kind = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(
            f"compressor '{by.name}' returns no score for each token of each kv head",
            given=kind,
            allowed=f"a real tensor {tuple(wanted)}: batch, kv heads, block tokens",
            remedy="Mend the score method of that compressor.",
        )
    if scores.device.type == "cuda":
        torch._assert_async(~scores.isnan().any(), f"compressor '{by.name}' returns scores that are no numbers")
    elif scores.device.type == "cpu" and bool(scores.isnan().any()):
        raise UserError(
            f"compressor '{by.name}' returns scores that are no numbers",
            given=f"NaN for {int(scores.isnan().sum())} of {scores.numel()} scores",
            allowed="numbers; -inf for rows that are never to be kept",
            remedy="Mend the score method of that compressor.",
        )


def top_rows(scores_BKS: Tensor, rows: int, skip: int) -> Tensor:
    """Return the indices (B, K, rows) of the highest scores per kv head, ascending, none below ``skip``.

    Equal scores go to the earlier token, so that every host and the dense twin choose alike.
    """
    scores_BKS = scores_BKS.float()
    if skip:
        scores_BKS = scores_BKS.clone()
        scores_BKS[..., :skip] = -torch.inf
    order = scores_BKS.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :rows].sort(dim=-1).values


COMPRESSORS: Registry[type[Compressor]] = Registry("compressor", "apb.compress", "compress")
