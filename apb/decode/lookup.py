"""Prompt lookup: what followed the same tokens earlier is the draft; no head is needed.

Source: prompt lookup decoding (Saxena, 2023) and LLMA (arXiv 2304.04487); several earlier places make a tree here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from apb.decode.base import DECODERS, Decoded, Decoder, Decoding
from apb.decode.speculate import speculate
from apb.decode.tree import Tree, root_only
from burst.errors import in_range
from burst.registry import option

LONGEST_MATCH = 16  # a longer one tells no more
PLACES = 64  # earlier places that are looked at; text that repeats itself has thousands


def check_tokens(tokens: int) -> None:
    """Raise UserError for trees without room for a draft."""
    fine = isinstance(tokens, int) and tokens >= 2
    in_range("decode.tokens", tokens, fine, "a whole number, 2 or more: the last decided token and its drafts")


@DECODERS.register("lookup", "drafts are the tokens that followed the same words earlier in prompt and answer")
@dataclass(frozen=True)
class Lookup(Decoder):
    """Drafts of up to ``tokens`` rows (the last decided token is one) where ``match`` tokens or more repeat.

    Raises UserError out of range.
    """

    tokens: int = option(16, "tokens verified at once: the last decided one, and its drafts")
    match: int = option(2, "tokens that must repeat")

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        fine = isinstance(self.match, int) and 1 <= self.match <= LONGEST_MATCH
        in_range("decode.match", self.match, fine, f"a whole number, 1 to {LONGEST_MATCH}")

    @property
    def needs_history(self) -> bool:
        """Drafts are copied from it."""
        return True

    @property
    def tree_tokens(self) -> int:
        """Rows of a tree."""
        return self.tokens

    @property
    def step_sizes(self) -> frozenset[int]:
        """A root alone, and a whole tree."""
        return frozenset({1, self.tokens})

    def generate(self, decoding: Decoding) -> Decoded:
        """Decode; every host calls this."""
        drafter = None
        if decoding.decides:
            drafter = _LookupDrafter(Matcher(decoding.request.history, self.match), self.tokens)
        return speculate(decoding, drafter, self.tokens)


class Matcher:
    """All tokens so far, and where the last ones stood before."""

    def __init__(self, history: Tensor | None, match: int) -> None:
        """``history``: int64 (N,) on any device."""
        assert history is not None
        self._match = match
        self._count = len(history)
        self._ids = np.empty(2 * self._count + 1024, dtype=np.int32)
        self._ids[: self._count] = history.cpu().numpy()

    def extend(self, tokens: Sequence[int]) -> None:
        """Add decided tokens."""
        count = self._count + len(tokens)
        if count > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(count, dtype=np.int32)])
        self._ids[self._count : count] = tokens
        self._count = count

    def places(self) -> list[int]:
        """Return where earlier occurrences of the last tokens end (the index after), longest match first, then latest.

        None is shorter than the least match.
        """
        ids = self._ids[: self._count]
        ends = np.flatnonzero(ids[:-1] == ids[-1]) + 1 if self._count else np.empty(0, dtype=np.int64)
        lengths = np.ones(len(ends), dtype=np.int64)
        alive = np.arange(len(ends))
        for back in range(2, min(LONGEST_MATCH, self._count) + 1):
            alive = alive[(ends[alive] >= back)]
            alive = alive[ids[ends[alive] - back] == ids[-back]]
            if not len(alive):
                break
            lengths[alive] = back
        enough = lengths >= self._match
        order = np.lexsort((-ends[enough], -lengths[enough]))
        found: list[int] = ends[enough][order[:PLACES]].tolist()
        return found

    def after(self, place: int, count: int) -> list[int]:
        """Return ``count`` tokens from ``place`` on, and from there again at the end: loops go on so."""
        left = self._count - place
        tokens: list[int] = self._ids[place + np.arange(count) % left].tolist()
        return tokens

    def continuation(self, count: int) -> list[int]:
        """Return ``count`` tokens that followed the best earlier place; none where there is none."""
        return next((self.after(place, count) for place in self.places()), [])


class _LookupDrafter:
    head_rows = 0

    def __init__(self, matcher: Matcher, tokens: int) -> None:
        self._matcher, self._tokens = matcher, tokens

    def draft(self, decided: Sequence[int], root: int, position: int, depth: int) -> Tree:
        self._matcher.extend(decided)
        tree, places = root_only(root), self._matcher.places()
        # Each place gets half of the rows that are left, so that other places have a say; the best one gets the rest.
        for place in places:
            if len(tree) == self._tokens:
                break
            share = (self._tokens - len(tree) + 1) // 2
            tree = tree.grafted(self._matcher.after(place, min(depth, share)), self._tokens)
        for place in places[:1]:
            tree = tree.grafted(self._matcher.after(place, depth), self._tokens)
        return tree

    def verified(self, rows: int, seconds: float) -> None:
        """Sizes do not depend on times here."""
