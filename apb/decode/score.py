"""Scoring: log-probabilities of given tokens after a cache, teacher-forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apb.decode.base import forward
from apb.kv.cache import HostCache
from burst.kernels import Kernel
from burst.transport import Transport

if TYPE_CHECKING:
    from apb.models.adapter import Adapter

CHUNK = 64  # tokens whose logits are held at once: 64 rows of a 150k vocabulary are 40 MB


@dataclass(frozen=True)
class Score:
    """Natural logarithms of probabilities. ``log_probs`` (S,): each given token after all before it; ``first`` (F, V):
    the whole distribution before each of the first F given tokens. Both fp32 (fp64 for fp64 models)."""

    log_probs: Tensor
    first: Tensor


def score(
    adapter: Adapter,
    kernel: Kernel,
    transport: Transport,
    cache: HostCache,
    token_ids: Sequence[int],
    first: int,
) -> Score | None:
    """Run ``token_ids`` over ``cache``, which goes on after them; every host calls this, the owner gets the score.

    The cache must hold the next token's logits.
    """
    decides = transport.rank == cache.owner
    ids = list(token_ids)
    found: list[Tensor] = []
    kept: list[Tensor] = []
    pending = cache.logits
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        # The row before the first of them is at hand; the last token's own row belongs to the next part.
        rows_SV = forward(adapter, kernel, transport, cache, part, all_logits=True)
        if not decides:
            continue
        assert pending is not None and rows_SV is not None
        before_SV = torch.cat([pending[None], rows_SV[:-1]]).log_softmax(dim=-1)
        pending = rows_SV[-1]
        found.append(before_SV.gather(1, torch.tensor(part, device=before_SV.device)[:, None])[:, 0])
        if start < first:
            kept.append(before_SV[: first - start])
    if not decides:
        return None
    return Score(torch.cat(found).cpu(), torch.cat(kept).cpu() if kept else torch.empty(0))
