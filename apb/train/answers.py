"""The frozen model's own answers to many prompts at once, with the features that its LM head read at every token.

Shapes: B sequences, S tokens of one pass (all sequences' side by side), T cached tokens, P tokens that all sequences
have in common, H query heads, K kv heads, G = H / K, D head dim, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apb.layers.call import Call, plain
from apb.models.adapter import Adapter
from burst.kernels import kernel
from burst.kernels.merge import merge

KEPT = 64  # tokens of what stands before all prompts that answers keep
FIRST = 8  # of these, its first ones
REPEATED = 16  # tokens: an answer that says so many of them twice goes round in circles
_CANDIDATES = 50  # most likely tokens that sampling chooses from
_FULL = 0.85  # of the cache's rows still answering; below, the others are taken out, which moves everything
_GROWTH = 64  # tokens: the cache is moved this often


@dataclass
class Answer:
    """Prompt and answer as one sequence; ``features_SE`` is that of every token but the last.

    Of a long text before all prompts alike, only the ``FIRST`` and the last tokens are in it.
    """

    prompt: int  # tokens
    ids: list[int]
    features_SE: Tensor | None
    ended: bool = False  # by a stop token
    circular: bool = False  # cut where it began to repeat itself
    _seen: set[tuple[int, ...]] = field(default_factory=set, repr=False)

    def add(self, token: int, stop_ids: Sequence[int]) -> bool:
        """Take a token and return whether the answer goes on."""
        self.ids.append(token)
        if token in stop_ids:
            self.ended = True
        elif len(self.ids) - self.prompt >= REPEATED:
            gram = tuple(self.ids[-REPEATED:])
            self.circular = gram in self._seen
            self._seen.add(gram)
        return not (self.ended or self.circular)


class _Before:
    """Stands in for a model's attention over what stands before all sequences, and keeps its keys and values."""

    needs_projections = False

    def __init__(self) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []  # (1, K, P, D) a layer

    def __call__(self, call: Call) -> Tensor:
        q_BHSD, k_BKSD, v_BKSD, scale = plain(call)
        self.kv.append((k_BKSD, v_BKSD))
        out_BHSD, _ = kernel("auto", q_BHSD.device, q_BHSD.dtype)(q_BHSD, k_BKSD, v_BKSD, causal=True, scale=scale)
        return out_BHSD.transpose(1, 2)


class _Cache:
    """Stands in for a model's attention over sequences of unequal length, one row of the cache each.

    What stands before them all is cached once: attention over it is merged with each sequence's own.
    """

    needs_projections = False

    def __init__(self, layers: int, before: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._before = before
        self._kv: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.row_S = self.at_S = torch.empty(0, dtype=torch.int64)  # where each token of a pass goes
        self.lengths_B = torch.empty(0, dtype=torch.int64)  # cached tokens, this pass's included

    def __call__(self, call: Call) -> Tensor:
        layer, (q_BHSD, k_BKSD, v_BKSD, scale) = call.layer, plain(call)
        kv = self._kv[layer]
        longest = int(self.lengths_B.max())
        if kv is None or longest > kv[0].shape[2]:
            kv = self._kv[layer] = self._grown(kv, k_BKSD, -(-longest // _GROWTH) * _GROWTH)
        k_BKTD, v_BKTD = kv
        k_BKTD[self.row_S, :, self.at_S] = k_BKSD[0].transpose(0, 1)
        v_BKTD[self.row_S, :, self.at_S] = v_BKSD[0].transpose(0, 1)
        q_SHD = q_BHSD[0].transpose(0, 1)
        first = len(self.row_S) != len(self.lengths_B)
        out_SHD, lse_SH = (self._prompts if first else self._next)(q_SHD, k_BKTD, v_BKTD, scale)
        if not self._before:
            return out_SHD[None]
        attend = kernel("auto", q_BHSD.device, q_BHSD.dtype)
        common = attend(q_BHSD, *self._before[layer], causal=False, scale=scale)
        out_BHSD, _ = merge([common, (out_SHD.transpose(0, 1)[None], lse_SH.T[None])], q_BHSD.dtype)
        return out_BHSD.transpose(1, 2)

    def keep(self, rows_B: Tensor) -> None:
        """Forget every sequence but these."""
        self._kv = [None if kv is None else (kv[0][rows_B], kv[1][rows_B]) for kv in self._kv]

    def _grown(self, kv: tuple[Tensor, Tensor] | None, like: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        shape = (len(self.lengths_B), like.shape[1], capacity, like.shape[3])
        grown = (like.new_zeros(shape), like.new_zeros(shape))
        if kv is not None:
            for new, old in zip(grown, kv, strict=True):
                new[:, :, : old.shape[2]] = old
        return grown

    def _next(self, q_SHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """One token a sequence: two small products are several times faster here than fused attention."""
        q_BKGD = q_SHD.unflatten(1, (k_BKTD.shape[1], -1))
        hidden_BT = torch.arange(k_BKTD.shape[2], device=q_SHD.device) >= self.lengths_B[:, None]
        scores_BKGT = (q_BKGD @ k_BKTD.transpose(-1, -2)).float() * scale
        scores_BKGT.masked_fill_(hidden_BT[:, None, None], -torch.inf)
        out_BKGD: Tensor = scores_BKGT.softmax(-1).to(v_BKTD.dtype) @ v_BKTD
        # Only a merge reads it; without one it would be one more pass over all scores, a layer and token.
        lse_BKG = scores_BKGT.logsumexp(-1) if self._before else scores_BKGT.new_empty(q_BKGD.shape[:-1])
        return out_BKGD.flatten(1, 2), lse_BKG.flatten(1, 2)

    def _prompts(self, q_SHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        batch, longest = len(self.lengths_B), int(self.lengths_B.max())
        q_BHTD = q_SHD.new_zeros(batch, q_SHD.shape[1], longest, q_SHD.shape[2])
        q_BHTD[self.row_S, :, self.at_S] = q_SHD
        attend = kernel("auto", q_SHD.device, q_SHD.dtype)
        out_BHTD, lse_BHT = attend(q_BHTD, k_BKTD[:, :, :longest], v_BKTD[:, :, :longest], causal=True, scale=scale)
        return out_BHTD[self.row_S, :, self.at_S], lse_BHT[self.row_S, :, self.at_S]


def answer(
    adapter: Adapter,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    longest: int,
    stop_ids: Sequence[int],
    seed: int,
    features: bool,
    before: Sequence[int] = (),
    kept: int = KEPT,
) -> list[Answer]:
    """Return an answer of at most ``longest`` tokens to every prompt; temperature 0 is greedy.

    Sampling chooses among the 50 most likely tokens. An answer ends with a stop token, or before it repeats 16 tokens.
    ``before`` are tokens that stand before every prompt; they run once, and answers keep ``kept`` of them.
    """
    device = adapter.device
    rng = torch.Generator(device).manual_seed(seed)
    common = _Before()
    kept_rows = [*range(len(before))] if len(before) <= kept else [*range(FIRST), *range(FIRST - kept, 0)]
    begun = [before[i] for i in kept_rows]
    answers = [Answer(len(begun) + len(ids), [*begun, *ids], None) for ids in prompts]
    begun_E: list[Tensor] = []
    if before:
        with torch.inference_mode():
            ids_P = torch.tensor(before, device=device)
            begun_E = [adapter.hidden(ids_P, torch.arange(len(before), device=device), common)[kept_rows]]
    cache = _Cache(adapter.shape.layers, common.kv)
    lengths_B = cache.lengths_B = torch.tensor([len(ids) for ids in prompts], device=device)
    cache.row_S = torch.arange(len(prompts), device=device).repeat_interleave(lengths_B)
    cache.at_S = torch.cat([torch.arange(len(ids), device=device) for ids in prompts])
    temperature_B = torch.tensor(temperatures, device=device)
    rows = list(range(len(prompts)))  # which answer each row of the cache belongs to
    going = set(rows)
    with torch.inference_mode():
        ids_S = torch.tensor([i for ids in prompts for i in ids], device=device)
        hidden_SE = adapter.hidden(ids_S, len(before) + cache.at_S, cache)
        made = [[*begun_E, part] for part in hidden_SE.split([len(ids) for ids in prompts])] if features else []
        hidden_BE = hidden_SE[lengths_B.cumsum(0) - 1]
        for count in range(longest):
            token_B = _choose(adapter.head(hidden_BE), temperature_B, rng)
            for i, token in zip(rows, token_B.tolist(), strict=True):
                if i in going and not answers[i].add(token, stop_ids):
                    going.remove(i)
            if count == longest - 1 or not going:
                break
            if len(going) < _FULL * len(rows):
                kept_B = torch.tensor([row for row, i in enumerate(rows) if i in going], device=device)
                rows = [i for i in rows if i in going]
                cache.keep(kept_B)
                token_B, lengths_B, temperature_B = token_B[kept_B], lengths_B[kept_B], temperature_B[kept_B]
            cache.row_S, cache.at_S = torch.arange(len(rows), device=device), lengths_B
            lengths_B = cache.lengths_B = lengths_B + 1
            hidden_BE = adapter.hidden(token_B, len(before) + cache.at_S, cache)
            if features:
                for i, part_E in zip(rows, hidden_BE.unbind(), strict=True):
                    if i in going:
                        made[i].append(part_E[None])
    for one, parts in zip(answers, made, strict=False):
        one.features_SE = torch.cat(parts)
    return answers


def _choose(logits_BV: Tensor, temperature_B: Tensor, rng: torch.Generator) -> Tensor:
    """Return a token a row: the most likely one at temperature 0, or one of the 50 most likely."""
    if not bool(temperature_B.any()):
        return logits_BV.float().argmax(-1)
    best_BC, ids_BC = logits_BV.float().topk(min(_CANDIDATES, logits_BV.shape[-1]))
    # An exponential race: the largest p / e, e exponential, falls on a token with probability p.
    race_BC = torch.empty_like(best_BC).exponential_(generator=rng)
    noise_BC = -race_BC.log() * temperature_B[:, None]
    return ids_BC.gather(1, (best_BC + noise_BC).argmax(-1, keepdim=True))[:, 0]
