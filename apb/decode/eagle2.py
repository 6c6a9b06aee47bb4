"""EAGLE-2 on a cache that may be sharded: trees from a small head, whose vocabulary may be a frequent subset.

The head runs on the owner alone, over its own window of keys: drafting sends nothing.

Shapes: B batch (1), F frontier nodes, E hidden width, H query heads, K kv heads, D head dim, T rows of the draft cache
that are seen, N nodes expanded so far, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apb.decode.base import DECODERS, Decoded, Decoder, Decoding
from apb.decode.lookup import Matcher, check_tokens
from apb.decode.speculate import speculate
from apb.decode.stride import Stride
from apb.decode.tree import Pool, Tree, build, capacity, expand, rerank, root_only
from apb.draft.cache import DraftCache
from apb.draft.steps import HeadSteps
from apb.layers.rows import LayerKV
from burst.errors import UserError, choose, in_range
from burst.kernels.reference import attend
from burst.registry import option

LOOKUP_MATCH = 4  # tokens that must repeat before the tree gives rows to what followed them
LOOKUP_SHARE = 4  # one row in so many, at most


@DECODERS.register("eagle2", "trees of drafts from a small head, verified on all shards at once")
@dataclass(frozen=True)
class Eagle2(Decoder):
    """Draft trees of ``depth`` levels, ``width`` nodes grown a level (EAGLE's top-k), ``tokens`` rows verified, root
    included.

    ``width`` 1 gives chains. ``tree`` auto takes fewer rows where the head's confidence does not pay for the measured
    time of a row. ``lookup`` merges what followed the same words earlier. Raises UserError out of range.
    Source: EAGLE-2 (arXiv 2406.16858); FR-Spec (arXiv 2502.14856).
    """

    depth: int = option(5, "levels of a tree")
    width: int = option(8, "nodes grown a level; 1: a chain")
    tokens: int = option(32, "most tokens verified at once, the last decided one among them")
    tree: Literal["fixed", "auto"] = option(
        "fixed", "fixed: always that many; auto: as many as the head's confidence and measured times pay for"
    )
    lookup: bool = option(False, "merge the tokens that followed the same words earlier into the tree")

    needs_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("depth", "width"):
            value = getattr(self, name)
            in_range(f"decode.{name}", value, isinstance(value, int) and value >= 1, "a whole number, 1 or more")
        check_tokens(self.tokens)
        choose("value of decode.tree:", self.tree, ("fixed", "auto"))
        most = 1 + capacity(self.depth, self.width)
        if self.tokens > most:
            raise UserError(
                "this draft tree cannot be filled",
                given=f"decode.tokens={self.tokens} with depth={self.depth} and width={self.width}",
                allowed=f"up to {most} tokens: the root, width, and width squared for every further level",
                remedy="Lower decode.tokens, or raise decode.depth or decode.width.",
            )

    @property
    def needs_history(self) -> bool:
        """True where prompt lookup is merged into the tree."""
        return self.lookup

    @property
    def tree_tokens(self) -> int:
        """Rows of a tree."""
        return self.tokens

    @property
    def step_sizes(self) -> frozenset[int]:
        """A root alone, and a whole tree; none where sizes follow measured times, which graphs would change."""
        return frozenset() if self.tree == "auto" else frozenset({1, self.tokens})

    def generate(self, decoding: Decoding) -> Decoded:
        """Decode; every host calls this."""
        drafter = None
        if decoding.decides:
            draft = decoding.cache.draft
            assert isinstance(draft, DraftCache)
            draft.adapt()
            matcher = Matcher(decoding.request.history, LOOKUP_MATCH) if self.lookup else None
            steps = HeadSteps(draft.head, decoding.capture)
            drafter = _TreeDrafter(self, draft, matcher, steps)
        return speculate(decoding, drafter, self.tokens)


class _TreeDrafter:
    def __init__(self, options: Eagle2, cache: DraftCache, matcher: Matcher | None, steps: HeadSteps) -> None:
        self._options, self._cache, self._matcher, self._steps = options, cache, matcher, steps
        self._stride = Stride(options.tokens) if options.tree == "auto" else None

    @property
    def head_rows(self) -> int:
        return self._steps.computed

    def draft(self, decided: Sequence[int], root: int, position: int, depth: int) -> Tree:
        chain: Sequence[int] = ()
        if self._matcher is not None:
            self._matcher.extend(decided)
            chain = self._matcher.continuation(min(depth, self._options.tokens // LOOKUP_SHARE))
        found = self._cache.root(root, position, self._steps)
        if found is None:  # the cache has come from another host: one step without drafts brings the feature
            return root_only(root).grafted(chain, self._options.tokens)
        levels = min(self._options.depth, depth)
        pool = self._grow(*found, position, levels)
        count = self._options.tokens - 1 - len(chain)
        if self._stride is not None:
            values = pool.values_N.sort(descending=True).values[:count].tolist()
            count = min(count, self._stride.rows(values) - 1)
        tree = root_only(root) if count == 0 else build(root, pool, rerank(pool, count))
        return tree.grafted(chain, self._options.tokens)

    def verified(self, rows: int, seconds: float) -> None:
        if self._stride is not None:
            self._stride.measured(rows, seconds)

    def _grow(self, out_BSE: Tensor, log_probs_FV: Tensor, position: int, levels: int) -> Pool:
        """Return the candidates below the root, of which the head's results are given; all levels' are candidates.

        Nothing here waits for a device: a tree's shape is only read once it is chosen.
        """
        head, top_k, device = self._cache.head, self._options.width, out_BSE.device
        keys = _Keys(self._cache.visible(position))
        pool = expand(None, log_probs_FV, top_k)
        seen_FN = torch.zeros(1, 0, dtype=torch.bool, device=device)
        for level in range(1, levels):
            nodes, parents_F = len(pool.frontier), pool.rows_F
            seen_FN = torch.cat([seen_FN[parents_F], torch.eye(nodes, dtype=torch.bool, device=device)], dim=1)
            ids_BF = head.ids_V[pool.tokens_N[pool.frontier]][None]
            at_F = torch.full((nodes,), position - 1 + level, device=device)
            out_BSE, log_probs_FV = self._steps(out_BSE[:, parents_F], ids_BF, at_F, keys.attention(seen_FN))
            pool = expand(pool, log_probs_FV, top_k)
        return replace(pool, tokens_N=head.ids_V[pool.tokens_N])


class _Keys:
    """Keys of draft nodes: decided tokens' rows, all seen, then the rows of every node expanded so far."""

    def __init__(self, decided: LayerKV) -> None:
        self._k_BKTD, self._v_BKTD = decided.k_BKTD, decided.v_BKTE
        self._decided = decided.k_BKTD.shape[2]

    def attention(self, seen_FN: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return the attention of new nodes that see those expanded nodes, themselves included."""
        seen_FT = torch.cat([seen_FN.new_ones(len(seen_FN), self._decided), seen_FN], dim=1)

        def run(q_BHFD: Tensor, k_BKFD: Tensor, v_BKFD: Tensor) -> Tensor:
            self._k_BKTD = torch.cat([self._k_BKTD, k_BKFD], dim=2)
            self._v_BKTD = torch.cat([self._v_BKTD, v_BKFD], dim=2)
            scale = q_BHFD.shape[-1] ** -0.5
            return attend(q_BHFD, self._k_BKTD, self._v_BKTD, causal=False, scale=scale, seen_ST=seen_FT)[0]

        return run
