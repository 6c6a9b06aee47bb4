"""Speculation over a cache on one or many hosts: draft a tree, verify it on all shards at once, keep a path.

Every host runs the tree's tokens. In sharded layers their queries see every shard without a mask; the few keys of the
tree itself are on the owner, which masks them; partial outputs are merged by their LSE as in any decoding. In the other
layers every host does the same. The owner walks the tree and drafts the next one, and tells both in one message a step:
the rows to keep of the last tree, and the next one with its parents.

Shapes: M tree rows, V vocabulary, F feature width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from apb.attention.cached import CacheAttention
from apb.decode.base import GO_ON, Decoded, Decoding, Drafting
from apb.decode.tree import Tree, root_only, walk
from apb.layers.tree import depths

WORD_BYTES = 4  # of a decision's int32 words


class Drafter(Protocol):
    """Proposes trees, on the owner only."""

    def draft(self, decided: Sequence[int], root: int, position: int, depth: int) -> Tree:
        """Return a tree under ``root``, the last decided token, which stands at ``position``.

        ``decided``: what was decided since the last call, root included; ``depth``: no path may be longer.
        """
        ...

    def verified(self, rows: int, seconds: float) -> None:
        """Hear how long the verification of a tree of ``rows`` rows took."""
        ...

    @property
    def head_rows(self) -> int:
        """Rows of the draft's LM head computed so far."""
        ...


def decision_words(tree_tokens: int) -> int:
    """Return the words of a step's message: ending, tokens decided, tree size; then those tokens, their rows in the
    last tree, and the next tree's tokens and parents."""
    return 3 + 4 * tree_tokens


def speculate(d: Decoding, drafter: Drafter | None, tree_tokens: int) -> Decoded:
    """Decode with drafts of up to ``tree_tokens`` rows; every host calls this, the owner with its drafter."""
    cache = d.cache
    assert d.decides == (drafter is not None)
    done = Drafting()
    rows, decided, told, features_MF, ending = list[int](), list[int](), list[int](), None, GO_ON
    if cache.undecoded is None:  # the prompt decides a token: nobody waits for a draft to hear of it
        ending, told = d.decide(), d.ids[-1:]
        if ending != GO_ON:
            return d.finished(ending, done if d.decides else None)
    while True:
        words = torch.zeros(decision_words(tree_tokens), dtype=torch.int32, device=d.transport.device)
        tree = None
        if drafter is not None:
            if done.steps:
                decided, ending = d.cut(decided)
                _keep(d, rows[: len(decided)], decided, features_MF)
                done.decided += len(decided)
            if ending == GO_ON:
                started = time.perf_counter()
                tree = _draft(d, drafter, told, decided)
                told = []
                done.draft_s += _finished_at(d) - started
            _write(words, decided, rows[: len(decided)], ending, tree, tree_tokens)
        d.transport.broadcast(words, cache.owner, kind="token", step=f"token {len(d.ids)}").wait()
        decided, kept, ending, tokens, parents = _read(words, tree_tokens)
        if done.steps:
            if drafter is None:
                cache.keep(kept)
            cache.length += len(decided)  # the tree's root and the accepted rows but for the bonus token
        d.take(decided)
        if ending != GO_ON:
            if drafter is not None:
                done.head_rows = drafter.head_rows
            return d.finished(ending, done if d.decides else None)
        started = time.perf_counter()
        verified = verify(d, tokens, parents, tree)
        done.steps += 1
        done.rows += len(tokens)
        if drafter is not None:
            assert verified is not None and tree is not None
            spent = _finished_at(d) - started
            done.verify_s += spent
            drafter.verified(len(tokens), spent)
            rows, decided = _walk(d, tree, verified[0])
            features_MF = verified[1]


def _finished_at(d: Decoding) -> float:
    """Return the time once the device has done what it was given: what follows reads its results anyway."""
    if d.adapter.device.type == "cuda":
        torch.cuda.synchronize(d.adapter.device)
    return time.perf_counter()


def _walk(d: Decoding, tree: Tree, logits_MV: Tensor) -> tuple[list[int], list[int]]:
    after = [d.cache.length + depth + 1 for depth in tree.depths]
    return walk(tree, lambda row: d.choose(logits_MV[row], position=after[row], path=tree.path(row)))


def verify(
    d: Decoding, tokens: Sequence[int], parents: Sequence[int], tree: Tree | None
) -> tuple[Tensor, Tensor | None] | None:
    """Run a tree's tokens over the cache, where they stay until ``HostCache.keep``.

    The owner, which alone drafted the tree, gets the logits (M, V) after every row and the features (M, F) that
    a draft head reads, where there is one; the others get None.
    """
    cache, adapter = d.cache, d.adapter
    if d.transport.rank not in cache.members:
        return None
    ids_M = torch.tensor(tokens, device=adapter.device)
    positions_M = cache.length + torch.tensor(depths(parents), device=adapter.device)
    attention = CacheAttention(cache, d.transport, d.kernel, cache.length, len(tokens), tuple(parents))
    if tree is None:
        adapter.run(ids_M, positions_M, attention)
        return None
    with adapter.capturing(cache.draft.taps if cache.draft is not None else None) as features:
        logits_MV = adapter.all_logits(ids_M, positions_M, attention)
    return logits_MV, features.value_SF if cache.draft is not None else None


def _draft(d: Decoding, drafter: Drafter, told: Sequence[int], decided: Sequence[int]) -> Tree:
    """Return the next tree, under the token decided last.

    ``told``: what all know already, only the drafter does not; ``decided``: what nobody else knows, nor the cache yet.
    """
    root = decided[-1] if decided else d.cache.undecoded
    assert root is not None
    position = d.cache.length + len(decided)
    left = d.request.max_new_tokens - len(d.ids) - len(decided)
    # A path of left - 1 drafts and its bonus token end the answer: what is deeper could never be taken.
    tree = drafter.draft([*told, *decided], root, position, left - 1) if left > 1 else root_only(root)
    assert max(tree.depths) < left
    return tree


def _keep(d: Decoding, rows: Sequence[int], decided: Sequence[int], features_MF: Tensor | None) -> None:
    """Keep the rows of the root and of all decided tokens but the last, drop the rest of the tree's."""
    cache = d.cache
    cache.keep(rows)
    if cache.draft is not None:
        assert features_MF is not None and cache.undecoded is not None
        kept_SF = features_MF[torch.tensor(rows, device=features_MF.device)]
        cache.draft.observe(kept_SF, [cache.undecoded, *decided[:-1]], cache.length)


def _write(
    words: Tensor, decided: Sequence[int], rows: Sequence[int], ending: int, tree: Tree | None, room: int
) -> None:
    tokens, parents = (tree.tokens, tree.parents) if tree is not None else ((), ())
    assert len(decided) <= room and len(tokens) <= room
    padded = [i for part in (decided, rows, tokens, parents) for i in (*part, *[0] * (room - len(part)))]
    words.copy_(torch.tensor([ending, len(decided), len(tokens), *padded]))


def _read(words: Tensor, room: int) -> tuple[list[int], list[int], int, list[int], list[int]]:
    """Return tokens decided, their rows in the last tree, the ending, and the next tree's tokens and parents."""
    ending, count, size, *rest = words.tolist()
    decided, rows, tokens, parents = (rest[i * room : (i + 1) * room] for i in range(4))
    return decided[:count], rows[:count], ending, tokens[:size], parents[:size]
