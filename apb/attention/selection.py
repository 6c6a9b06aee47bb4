"""Selection: which rows of a block are passed on, by a compressor's scores.

Shapes: B batch (1), H query heads, K kv heads, L block tokens, R selected rows, D head dim, E value dim, Q question
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from apb.compress.base import Candidates, Compressor, check_scores, top_rows
from apb.layers.call import AttentionCall
from apb.layers.latent import HEADS_AT_ONCE
from apb.layers.rows import LayerKV
from apb.plan.plan import PrefillPlan
from apb.plan.steps import Select


class Selection:
    """One host's choice among its blocks' rows; ``rotate`` turns a layer's queries or keys on by positions."""

    def __init__(
        self,
        plan: PrefillPlan,
        rank: int,
        compressor: Compressor | None,
        question_delta: int | None,
        rotate: Callable[[Tensor, int | Tensor, int], Tensor],
    ) -> None:
        """``question_delta``: positions between the anchor's copy of the question and the question itself."""
        self._compressor, self._delta, self._rotate = compressor, question_delta, rotate
        self._numbers, self._spans = plan.numbers[rank], plan.host_plans[rank].spans
        self._end = plan.lengths.context

    def __call__(self, step: Select, call: AttentionCall, block: LayerKV, question_BHQD: list[Tensor]) -> Tensor:
        """Return a block's kept rows, keys and values side by side, (B, K, R, D + E), to travel as one message.

        ``call``: of the block's tokens; ``question_BHQD``: the embedded question's queries, in parts.
        """
        assert self._compressor is not None
        question_q = None
        if self._compressor.needs_question:
            assert self._delta is not None
            question_q = self._rotate(torch.cat(question_BHQD, dim=2), self._delta, call.layer)
        seen = Candidates(
            layer=call.layer,
            rank=self._numbers[step.block],
            q_BHSD=call.q_BHSD,
            k_BKSD=block.k_BKTD,
            v_BKSD=block.v_BKTE,
            scale=call.scale,
            question_q_BHQD=question_q,
            projections=call.projections,
            start=self._spans[step.block][0],
            end=self._end,
            rotate=lambda x_BHSD, delta: self._rotate(x_BHSD, delta, call.layer),
        )
        scores_BKL = self._scored(seen) if call.latent is None else self._of_latents(seen, call)
        index_BKR = top_rows(scores_BKL, step.rows, step.skip)
        picked = [
            x.gather(2, index_BKR[..., None].expand(-1, -1, -1, x.shape[3])) for x in (block.k_BKTD, block.v_BKTE)
        ]
        return torch.cat(picked, dim=-1)

    def _scored(self, seen: Candidates) -> Tensor:
        assert self._compressor is not None
        scores_BKL = cast("object", self._compressor.score(seen))
        check_scores(self._compressor, scores_BKL, seen.k_BKSD)
        assert isinstance(scores_BKL, Tensor)
        return scores_BKL

    def _of_latents(self, seen: Candidates, call: AttentionCall) -> Tensor:
        """Return one score a latent, (B, 1, L): the mean over the heads whose keys and values are made of it."""
        assert call.latent is not None
        parts_BHL = []
        for start in range(0, call.q_BHSD.shape[1], HEADS_AT_ONCE):
            heads = slice(start, start + HEADS_AT_ONCE)
            k, v = call.latent.of(heads).expand(seen.k_BKSD, seen.v_BKSD)
            asked = None if seen.question_q_BHQD is None else seen.question_q_BHQD[:, heads]
            some = dataclasses.replace(seen, q_BHSD=seen.q_BHSD[:, heads], k_BKSD=k, v_BKSD=v, question_q_BHQD=asked)
            parts_BHL.append(self._scored(some))
        return torch.cat(parts_BHL, dim=1).mean(dim=1, keepdim=True)
