"""Accepted length on the real walk: how far drafted trees follow what the target went on to say, jump after jump.

It needs no decoder: the target's tokens are known, so only the draft head runs, over many answers at once.
Shapes: B answers, S tokens, E hidden size, K kv heads, D head dim, N tree nodes drafted so far, C nodes of one level,
V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from apb.draft.base import DraftHead
from apb.train.answers import FIRST
from apb.train.features import FeatureSample
from apb.train.unroll import visible


@dataclass(frozen=True)
class TreeSize:
    """Levels of the tree, children of a node and nodes kept of a level, and all tokens, the root included."""

    depth: int = 5
    top_k: int = 8
    tokens: int = 32


@dataclass(frozen=True)
class Walked:
    """Tokens said, the bonus tokens included, and the target's steps they took, of one answer."""

    tokens: int
    steps: int


def accepted_length(walked: Sequence[Walked]) -> float:
    """Return tokens for each step over several answers."""
    return sum(w.tokens for w in walked) / max(1, sum(w.steps for w in walked))


class _Answers:
    """Results of the head over all true features at once: keys and values of every pair, and outputs as roots."""

    def __init__(self, head: DraftHead, samples: Sequence[FeatureSample], hidden: int) -> None:
        self.head = head
        device, dtype = head.target.device, head.target.dtype
        self.ids_BS = pad_sequence([s.ids_S.long() for s in samples], batch_first=True).to(device)
        features_BSE = pad_sequence([s.features_SE for s in samples], batch_first=True).to(device, dtype)
        after_BS = self.ids_BS.roll(-1, dims=1)
        hidden_BSE = head.fuse(features_BSE)
        rows_S = torch.arange(hidden_BSE.shape[1], device=device)
        self.positions_S = torch.where(rows_S < FIRST, rows_S, rows_S + hidden)
        mask_SS = visible(self.positions_S, head.window, head.sinks)

        def attend(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
            self.kv = (k_BKSD, v_BKSD)
            return F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, attn_mask=mask_SS, enable_gqa=True)

        self.allowed_BV: Tensor | None = None
        self.out_BSE = head.step(hidden_BSE, after_BS, self.positions_S, attend)


@torch.inference_mode()
def walk(
    head: DraftHead,
    samples: Sequence[FeatureSample],
    size: TreeSize,
    vocab_of: Callable[[FeatureSample], Tensor] | None = None,
    hidden: int = 0,
) -> list[Walked]:
    """Return what each answer took: every step drafts a tree at the last token and jumps by what it got right and one.

    ``vocab_of`` gives each answer a draft vocabulary of its own, of ids that the head's has. ``hidden`` tokens, which
    the samples lack, stand behind their ``FIRST`` ones; the head must see neither them nor the last one before them.
    """
    answers = _Answers(head, samples, hidden)
    if vocab_of is not None:
        own = [vocab_of(s).to(head.ids_V.device) for s in samples]
        answers.allowed_BV = torch.stack([torch.isin(head.ids_V, ids_V) for ids_V in own])
    device = head.target.device
    at_B = torch.tensor(
        [s.prompt - 1 for s in samples], device=device
    )  # the pair whose output is the root's: its token is known
    end_B = torch.tensor([len(s.ids_S) - 1 for s in samples], device=device)  # the last token
    steps_B = torch.zeros(len(samples), dtype=torch.int64, device=device)
    while True:
        rows = (at_B + 1 < end_B).nonzero()[:, 0]
        if not len(rows):
            break
        right_B = _draft(answers, rows, at_B[rows], size)
        steps_B[rows] += 1
        at_B[rows] = torch.minimum(at_B[rows] + 1 + right_B, end_B[rows] - 1)
    tokens = [int(e) - s.prompt for e, s in zip(end_B, samples, strict=True)]
    return [Walked(t, int(n)) for t, n in zip(tokens, steps_B, strict=True)]


def _draft(answers: _Answers, rows_B: Tensor, at_B: Tensor, size: TreeSize) -> Tensor:
    """Grow a tree at each answer's root and return how many drafted tokens the answer goes on with."""
    head, k = answers.head, size.top_k
    batch, device = len(rows_B), rows_B.device
    k_BKSD, v_BKSD = (x[rows_B] for x in answers.kv)
    positions_S = answers.positions_S
    root_B = positions_S[at_B]
    back_BS = root_B[:, None] - positions_S
    seen_BS = back_BS >= 0
    hidden_BCE = answers.out_BSE[rows_B, at_B][:, None]
    score_BC = torch.zeros(batch, 1, device=device)
    above_BCN = torch.zeros(
        batch, 1, 0, dtype=torch.bool, device=device
    )  # which drafted rows each node of the frontier sees
    node_BC = torch.full((batch, 1), -1, device=device)  # the pool's number of each node of the frontier; -1: the root
    pool: dict[str, list[Tensor]] = {"score": [], "token": [], "parent": []}
    count = 0
    for level in range(size.depth):
        logits_BCV = head.logits(hidden_BCE).float()
        if answers.allowed_BV is not None:
            logits_BCV = logits_BCV.masked_fill(~answers.allowed_BV[rows_B, None], -torch.inf)
        best_BCk, index_BCk = logits_BCV.log_softmax(-1).topk(k)
        child_score_BM = (score_BC[..., None] + best_BCk).flatten(1)
        child_token_BM = head.ids_V[index_BCk].flatten(1)
        parent_BM = node_BC.repeat_interleave(k, dim=1)
        for name, part in (("score", child_score_BM), ("token", child_token_BM), ("parent", parent_BM)):
            pool[name].append(part)
        if level == size.depth - 1:
            break
        score_BC, chosen_BC = child_score_BM.topk(k)
        token_BC = child_token_BM.gather(1, chosen_BC)
        node_BC = count + chosen_BC
        count += child_score_BM.shape[1]
        source_BC = chosen_BC // k
        hidden_BCE = hidden_BCE.gather(1, source_BC[..., None].expand(-1, -1, hidden_BCE.shape[-1]))
        above_BCN = above_BCN.gather(1, source_BC[..., None].expand(-1, -1, above_BCN.shape[-1]))
        own_BCC = torch.eye(k, dtype=torch.bool, device=device).expand(batch, k, k)
        above_BCN = torch.cat([above_BCN, own_BCC], dim=-1)
        at_level_B = root_B + 1 + level
        window_BS = seen_BS
        if head.window is not None:
            near_BS = at_level_B[:, None] - positions_S < head.window
            window_BS = seen_BS & (near_BS | (positions_S < head.sinks))
        mask_B1CT = torch.cat([window_BS[:, None].expand(-1, k, -1), above_BCN], dim=-1)[:, None]

        def attend(q_BHSD: Tensor, new_k: Tensor, new_v: Tensor, mask: Tensor = mask_B1CT) -> Tensor:
            nonlocal k_BKSD, v_BKSD
            k_BKSD, v_BKSD = torch.cat([k_BKSD, new_k], dim=2), torch.cat([v_BKSD, new_v], dim=2)
            return F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, attn_mask=mask, enable_gqa=True)

        hidden_BCE = head.step(hidden_BCE, token_BC, at_level_B[:, None].expand(-1, k), attend)
    whole = {name: torch.cat(parts, dim=1) for name, parts in pool.items()}
    return _followed(answers, rows_B, at_B, whole, size)


def _followed(answers: _Answers, rows_B: Tensor, at_B: Tensor, pool: dict[str, Tensor], size: TreeSize) -> Tensor:
    """Return how far each answer goes on within the best nodes of its pool."""
    last = answers.ids_BS.shape[1] - 1
    drafted = min(size.tokens - 1, pool["score"].shape[1])
    # A child is never likelier than its parent and stands behind it, so a stable order keeps the tree connected.
    kept_BM = torch.zeros_like(pool["token"], dtype=torch.bool)
    order = pool["score"].sort(dim=1, descending=True, stable=True).indices[:, :drafted]
    kept_BM.scatter_(1, order, True)
    node_B = torch.full_like(rows_B, -1)
    right_B = torch.zeros_like(rows_B)
    going_B = torch.ones_like(rows_B, dtype=torch.bool)
    for level in range(size.depth):
        place_B = at_B + 2 + level
        said_B = answers.ids_BS[rows_B, place_B.clamp(max=last)]
        match_BM = kept_BM & (pool["parent"] == node_B[:, None]) & (pool["token"] == said_B[:, None])
        going_B &= match_BM.any(1) & (place_B <= last)
        right_B += going_B
        node_B = torch.where(going_B, match_BM.int().argmax(1), -2)
    return right_B
