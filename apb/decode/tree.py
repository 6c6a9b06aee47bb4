"""Draft trees as data: grow a pool of candidates, choose the best, verify by walking; no model is needed.

Shapes: F frontier nodes, V draft vocabulary, N candidates of the pool, M rows of a tree (row 0 is its root), C chosen.
Source: EAGLE-2 (arXiv 2406.16858), section 4; the walk over drawn tokens is that of CPM.cu, equal in distribution to
EAGLE's and token for token what decoding without drafts draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from apb.layers.tree import ROOT, depths, visible


@dataclass(frozen=True)
class Pool:
    """Every candidate so far. ``values_N``: log-probability of the path to it, fp32, never above its parent's;
    ``parents_N``: candidates, or ROOT; ``frontier``: those that are grown next; ``rows_F``: where the parent of each of
    them stood in the frontier before. Parents stand before their children."""

    tokens_N: Tensor
    values_N: Tensor
    parents_N: Tensor
    frontier: Tensor
    rows_F: Tensor

    def __len__(self) -> int:
        return len(self.tokens_N)


@dataclass(frozen=True)
class Tree:
    """Drafted tokens to verify at once: row 0 is the last decided token, each row's parent stands before it."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]  # rows; ROOT for row 0 (in a pool, of its first level)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> tuple[int, ...]:
        """Steps from the root; added to the root's position they are the rows' positions."""
        return depths(self.parents)

    def path(self, row: int) -> tuple[int, ...]:
        """Return the tokens from below the root to a row, that one included."""
        tokens: tuple[int, ...] = ()
        while row:
            tokens, row = (self.tokens[row], *tokens), self.parents[row]
        return tokens

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Return (M, M) bool: which rows each row sees, itself and its ancestors."""
        return visible(self.parents, device)

    def grafted(self, chain: Iterable[int], limit: int) -> Tree:
        """Return the tree with a chain of tokens from its root, sharing what is there already, of ``limit`` rows at
        most (then the chain is cut)."""
        tokens, parents, row = list(self.tokens), list(self.parents), 0
        children = {(parent, token): i for i, (token, parent) in enumerate(zip(tokens, parents, strict=True))}
        for token in chain:
            if (row, token) not in children:
                if len(tokens) >= limit:
                    break
                children[row, token] = len(tokens)
                tokens.append(token)
                parents.append(row)
            row = children[row, token]
        return Tree(tuple(tokens), tuple(parents))


def root_only(token: int) -> Tree:
    """Return the tree that drafts nothing."""
    return Tree((token,), (ROOT,))


def capacity(depth: int, top_k: int) -> int:
    """Return how many candidates a pool of that depth holds: ``top_k`` and then ``top_k`` squared a level."""
    return top_k + (depth - 1) * top_k**2


def expand(pool: Pool | None, log_probs_FV: Tensor, top_k: int) -> Pool:
    """Return the pool with ``top_k`` children of every frontier node (of the root when there is no pool yet).

    ``log_probs_FV``: the draft's log-probabilities after each of them. The best ``top_k`` children become the next
    frontier; all stay candidates.
    """
    # A rounded log-softmax may stand a little above 0; a child better than its parent could be chosen without it.
    log_probs_FV = log_probs_FV.float().clamp(max=0.0)
    if pool is None:
        none = torch.empty(0, dtype=torch.int64, device=log_probs_FV.device)
        root = torch.full((1,), ROOT, device=log_probs_FV.device)
        pool = Pool(none, none.float(), none, root, none)
        before_F = log_probs_FV.new_zeros(1)
    else:
        before_F = pool.values_N[pool.frontier]
    assert len(before_F) == len(log_probs_FV), (len(before_F), log_probs_FV.shape)
    tokens_FK = best(log_probs_FV, min(top_k, log_probs_FV.shape[1]))
    values = (before_F[:, None] + log_probs_FV.gather(1, tokens_FK)).flatten()
    parents = pool.frontier.repeat_interleave(tokens_FK.shape[1])
    grown_F = best(values[None], min(top_k, len(values)))[0]
    return Pool(
        torch.cat([pool.tokens_N, tokens_FK.flatten()]),
        torch.cat([pool.values_N, values]),
        torch.cat([pool.parents_N, parents]),
        len(pool) + grown_F,
        grown_F // tokens_FK.shape[1],
    )


def rerank(pool: Pool, count: int) -> Tensor:
    """Return the ``count`` best candidates in pool order, parents first; they are a connected tree.

    Equal values go to the earlier candidate, and no child's value is above its parent's: so no child is chosen alone.
    """
    return best(pool.values_N[None], min(count, len(pool)))[0].sort().values


def build(root: int, pool: Pool, chosen_C: Tensor) -> Tree:
    """Return the tree of the root token and the chosen candidates, in their order."""
    chosen: list[int] = chosen_C.tolist()
    row_of = {ROOT: 0} | {candidate: row for row, candidate in enumerate(chosen, start=1)}
    tokens: list[int] = pool.tokens_N[chosen_C].tolist()
    parents: list[int] = pool.parents_N[chosen_C].tolist()
    return Tree((root, *tokens), (ROOT, *(row_of[parent] for parent in parents)))


def walk(tree: Tree, choose: Callable[[int], int]) -> tuple[list[int], list[int]]:
    """Return the accepted rows, root first, and the tokens decided: one after each of those rows.

    ``choose(row)`` decides the token after a row as decoding without drafts would. While that token is drafted below
    the row, the walk goes on there; so the tokens are the accepted drafts and one more, the bonus.
    """
    child = {(parent, token): row for row, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True))}
    rows, tokens, row = [0], list[int](), 0
    while True:
        tokens.append(choose(row))
        following = child.get((row, tokens[-1]))
        if following is None:
            return rows, tokens
        row = following
        rows.append(row)


def best(x_RN: Tensor, count: int) -> Tensor:
    """Return the indices (R, count) of each row's largest entries, largest first, the earlier of equal ones.

    There is no NaN among them: it equals nothing, and what would be returned is not their largest. ``torch.topk`` takes
    any of equal entries, another one on another device or at another size.
    """
    n = x_RN.shape[1]
    least_R1 = x_RN.topk(count, dim=-1).values[:, -1:]
    # Numbers that fall with the index, larger where x is above the least one: no two alike, and the device is never
    # asked how many there are.
    from_end_N = torch.arange(n, 0, -1, dtype=torch.int32, device=x_RN.device)
    key_RN = torch.where(x_RN > least_R1, n + from_end_N, torch.where(x_RN == least_R1, from_end_N, 0))
    index_RC = (n - 1 - (key_RN.topk(count, dim=-1).values - 1) % n).long()
    order_RC = x_RN.gather(1, index_RC).sort(dim=-1, descending=True, stable=True).indices
    return index_RC.gather(1, order_RC)
