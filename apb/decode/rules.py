"""Rules of a model's generation configuration for the choice of tokens: penalties and bans that look at tokens so far.

They stand between logits and sampling, in the order and with the arithmetic of transformers, so that greedy decoding
gives its tokens. They are functions of the logits and of the tokens before a position, along a draft tree's path as in
plain decoding; so all ways of decoding still give the same tokens.

Shapes: V vocabulary, N tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """Names and meanings are those of generation_config.json; a default changes nothing."""

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def changes(self) -> dict[str, Any]:
        """Those that change something, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


class Past:
    """All tokens so far, and what the rules make of logits after them and some more; on the host that decides."""

    def __init__(self, rules: Rules, history: Tensor, stop_ids: Sequence[int]) -> None:
        """``history``: int64 (N,), prompt and earlier answers: what transformers would be given as its prompt."""
        self._rules, self._stop_ids = rules, tuple(stop_ids)
        self._begin = self._count = len(history)
        self._ids = np.empty(2 * self._count + 1024, dtype=np.int64)
        self._ids[: self._count] = history.cpu().numpy()

    def extend(self, tokens: Sequence[int]) -> None:
        """Add decided tokens."""
        self._count = len(self._with(tokens))

    def ruled(self, logits_V: Tensor, path: Sequence[int]) -> Tensor:
        """Return logits as the rules want them, after the tokens so far and those of ``path``."""
        rules, ids_N = self._rules, self._with(path)
        logits_V = logits_V.clone()
        vocab = len(logits_V)
        if rules.repetition_penalty != 1.0:
            seen = _indices(np.unique(ids_N), logits_V)
            scores = logits_V[seen]
            penalty = rules.repetition_penalty
            logits_V[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
        banned = [*rules.suppress_tokens, *_repeating(ids_N, rules.no_repeat_ngram_size)]
        banned += [word[-1] for word in rules.bad_words_ids if self._completes(word, ids_N)]
        new = len(ids_N) - self._begin
        if new < rules.min_new_tokens or len(ids_N) < rules.min_length:
            banned += self._stop_ids
        if not new:
            banned += rules.begin_suppress_tokens
        logits_V[_indices(np.array([i for i in banned if i < vocab], dtype=np.int64), logits_V)] = -torch.inf
        return logits_V

    def _with(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        count = self._count + len(tokens)
        if count > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(count, dtype=np.int64)])
        self._ids[self._count : count] = tokens
        return self._ids[:count]

    def _completes(self, word: Sequence[int], ids_N: np.ndarray[Any, Any]) -> bool:
        """Return True where one more token would complete a bad word; stop tokens are none."""
        if len(word) == 1:
            return word[0] not in self._stop_ids
        return len(word) <= len(ids_N) and bool((ids_N[len(ids_N) + 1 - len(word) :] == word[:-1]).all())


def _repeating(ids_N: np.ndarray[Any, Any], size: int) -> list[int]:
    """Return the tokens that would complete ``size`` tokens in a row that stand there already."""
    if not 0 < size <= len(ids_N):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(ids_N, size)
    found: list[int] = windows[(windows[:, :-1] == ids_N[len(ids_N) + 1 - size :]).all(axis=1), -1].tolist()
    return found


def _indices(ids: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    return torch.from_numpy(ids[ids < len(like)]).to(like.device)
