"""Layouts: the tokens of each rank in their local order.

contiguous: rank r holds the r-th stretch. zigzag: each document is cut into 2P chunks, rank r holds chunks r
and 2P-1-r, so that under a causal mask all ranks work alike. striped: rank r holds positions r mod P.

Source: zigzag of ring-flash-attention; Striped Attention, arXiv 2311.09431; uneven and packed ours.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from burst.errors import UserError, choose
from burst.layouts.masks import MaskPiece, Span, pieces

NAMES = ("contiguous", "striped", "zigzag")

_pieces = lru_cache(maxsize=65536)(pieces)


@dataclass(frozen=True)
class Layout:
    """The tokens of ``world`` ranks as data; hashable and comparable.

    ``spans[rank]`` lists the rank's tokens in its local order, ascending by document and position. ``base``
    is the position of the first token that ``shard`` knows (the history's length for the queries of a later
    chunk).
    """

    name: str
    n_tokens: int
    world: int
    cu_seqlens: tuple[int, ...]  # edges of the documents: 0, ..., base + n_tokens
    spans: tuple[tuple[Span, ...], ...]
    base: int = 0

    def __str__(self) -> str:
        documents = len(self.cu_seqlens) - 1
        return f"{self.name} of {self.n_tokens} tokens over {self.world} ranks ({documents} documents)"

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Every attention call looks its schedule up by layout; packed documents make thousands of spans.
        return hash((self.name, self.world, self.cu_seqlens, self.base, self.spans))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens by rank; any may be 0."""
        return tuple(sum(span.count for span in spans) for spans in self.spans)

    def positions(self, rank: int) -> Tensor:
        """Positions in the whole sequence of the rank's tokens, int64 (S_rank,), in local order."""
        parts = [torch.arange(s.count) * s.step + s.start for s in self.spans[rank]]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def document_positions(self, rank: int) -> Tensor:
        """Positions from each document's own start, int64 (S_rank,), for rotary embeddings."""
        starts = [torch.full((s.count,), self.cu_seqlens[s.document]) for s in self.spans[rank]]
        return self.positions(rank) - torch.cat(starts) if starts else self.positions(rank)

    def rows(self, rank: int, positions: Tensor) -> Tensor:
        """Rows in the rank's local order of tokens that it holds, int64, shaped as ``positions``."""
        own, order = self.positions(rank).sort()
        found = torch.searchsorted(own, positions)
        return order[found]

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """Return the rank's rows of a tensor of all tokens along ``dim``; UserError for another size."""
        self._check_size(x.shape[dim], self.n_tokens, "the whole sequence")
        return x.index_select(dim, (self.positions(rank) - self.base).to(x.device))

    def unshard(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Put the ranks' tensors, by rank, back into sequence order along ``dim``: ``shard``'s inverse."""
        self._check_size(len(parts), self.world, "one part a rank")
        for rank, part in enumerate(parts):
            self._check_size(part.shape[dim], self.counts[rank], f"rank {rank}'s tokens")
        order = torch.cat([self.positions(rank) for rank in range(self.world)]).argsort()
        return torch.cat(list(parts), dim).index_select(dim, order.to(parts[0].device))

    def pieces(
        self, q_rank: int, kv_rank: int, *, causal: bool = True, window: int | None = None, keys: Layout | None = None
    ) -> tuple[MaskPiece, ...]:
        """Mask of this layout's queries on ``q_rank`` against the keys on ``kv_rank``; empty: nothing to do.

        ``keys`` is the layout of the keys when it differs (``extend``). Window and exactness: see
        ``masks.pieces``.
        """
        return _pieces(self.spans[q_rank], (keys or self).spans[kv_rank], causal=causal, window=window)

    def pairs(self, rank: int, *, causal: bool = True, window: int | None = None, keys: Layout | None = None) -> int:
        """Unmasked pairs of the rank's queries with all keys: its share of the work."""
        keys = keys or self
        sources = range(keys.world)
        return sum(p.pairs for s in sources for p in self.pieces(rank, s, causal=causal, window=window, keys=keys))

    def grouped(self, groups: Sequence[Sequence[int]]) -> Layout:
        """Layout whose rank g holds all tokens of the ranks ``groups[g]``, ascending: Ulysses' groups."""
        spans = tuple(self._union(group) for group in groups)
        return replace(self, world=len(groups), spans=spans)

    def _union(self, ranks: Sequence[int]) -> tuple[Span, ...]:
        if len(ranks) == self.world:  # stripes of all ranks make up whole documents again
            edges = list(pairwise(self.cu_seqlens))
            return _number([(max(a, self.base), b - max(a, self.base), 1, d) for d, (a, b) in enumerate(edges)])
        mine = sorted((s.document, s.start, s.count, s.step) for r in ranks for s in self.spans[r])
        return _number([(start, count, step, document) for document, start, count, step in mine])

    def extend(self, n_tokens: int, name: str | None = None) -> tuple[Layout, Layout]:
        """Add a chunk of ``n_tokens`` after this layout's tokens: the chunk's layout and that of all keys.

        Every rank keeps its rows and appends its share of the chunk, so the keys' local order is not
        ascending by position. Raises UserError for packed documents, and where striped meets another layout.
        """
        if len(self.cu_seqlens) > 2:
            raise UserError(
                "a packed sequence cannot be extended",
                given=f"{len(self.cu_seqlens) - 1} documents",
                allowed="one document",
                remedy="Extend each document in a layout of its own.",
            )
        name = name or self.name
        if self.n_tokens and (name == "striped") != (self.name == "striped") and self.world > 1:
            raise UserError(
                "striped chunks follow striped chunks only",
                given=f"{name} after {self.name}",
                allowed=self.name,
                remedy="Use one layout for all chunks.",
            )
        base = self.base + self.n_tokens
        spans = _build(name, (base, base + n_tokens), self.world, list(self.counts))
        chunk = Layout(name, n_tokens, self.world, (0, base + n_tokens), spans, base)
        both = tuple(
            (*old, *(replace(s, offset=s.offset + count) for s in new))
            for old, new, count in zip(self.spans, chunk.spans, self.counts, strict=True)
        )
        return chunk, Layout(name, base + n_tokens, self.world, (0, base + n_tokens), both)

    def _check_size(self, given: int, allowed: int, what: str) -> None:
        if given != allowed:
            raise UserError(
                f"the layout has {what} of another size",
                given=given,
                allowed=allowed,
                remedy="Shard with the layout that was made for this length and world.",
            )


def layout(name: str, n_tokens: int, world: int, cu_seqlens: Sequence[int] | None = None) -> Layout:
    """Lay ``n_tokens`` out over ``world`` ranks: contiguous, zigzag or striped; ranks may stay empty.

    ``cu_seqlens`` (0, ..., n_tokens; non-decreasing) packs documents into the sequence: zigzag then cuts
    every document by itself. Raises UserError for an unknown name, no rank, or edges that do not fit.
    """
    choose("layout", name, NAMES)
    if world < 1 or n_tokens < 0:
        raise UserError(
            "a layout needs a rank and a length",
            given=f"{world} ranks, {n_tokens} tokens",
            allowed="1 rank or more, 0 tokens or more",
            remedy="Check world and n_tokens.",
        )
    edges = (0, n_tokens) if cu_seqlens is None else tuple(int(edge) for edge in cu_seqlens)
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != n_tokens or any(a > b for a, b in pairwise(edges)):
        raise UserError(
            "cu_seqlens does not fit the sequence",
            given=edges,
            allowed=f"0 first, {n_tokens} last, never falling",
            remedy="Pass the running sum of the documents' lengths.",
        )
    return Layout(name, n_tokens, world, edges, _build(name, edges, world, [0] * world))


def _build(name: str, edges: tuple[int, ...], world: int, loads: list[int]) -> tuple[tuple[Span, ...], ...]:
    """Deal the documents out; ``loads`` counts the tokens of each rank so far and is updated."""
    drafts: list[list[tuple[int, int, int, int]]] = [[] for _ in range(world)]
    if name == "contiguous":
        total = edges[-1] - edges[0]
        size, extra = divmod(total, world)
        cuts = [edges[0] + r * size + min(r, extra) for r in range(world + 1)]
        for document, (a, b) in enumerate(pairwise(edges)):
            for r, (left, right) in enumerate(pairwise(cuts)):
                drafts[r].append((max(a, left), min(b, right) - max(a, left), 1, document))
    elif name == "striped":
        for document, (a, b) in enumerate(pairwise(edges)):
            for r in range(world):
                first = a + (r - a) % world
                drafts[r].append((first, -((first - b) // world), world, document))
    else:
        for document, (a, b) in enumerate(pairwise(edges)):
            for r, start, count in _zigzag(a, b, world, loads):
                drafts[r].append((start, count, 1, document))
    return tuple(_number(draft) for draft in drafts)


def _zigzag(a: int, b: int, world: int, loads: list[int]) -> list[tuple[int, int, int]]:
    """Cut a document into 2P chunks (rank, start, count); what is left over goes to ranks with the fewest."""
    owners = [*range(world), *reversed(range(world))]
    size, extra = divmod(b - a, 2 * world)
    sizes = [size] * (2 * world)
    for r in range(world):
        loads[r] += 2 * size
    spare = [(loads[owner], c) for c, owner in enumerate(owners)]
    heapq.heapify(spare)
    while extra:
        load, chosen = heapq.heappop(spare)
        if load < loads[owners[chosen]]:  # its owner's other chunk has grown meanwhile
            heapq.heappush(spare, (loads[owners[chosen]], chosen))
            continue
        sizes[chosen] += 1
        loads[owners[chosen]] += 1
        extra -= 1
    out, start = [], a
    for owner, count in zip(owners, sizes, strict=True):
        out.append((owner, start, count))
        start += count
    return out


def _number(draft: Sequence[tuple[int, int, int, int]]) -> tuple[Span, ...]:
    """Give spans their rows, drop empty ones, join neighbours: a rank's two middle chunks are one stretch."""
    out: list[Span] = []
    offset = 0
    for start, count, step, document in draft:
        if count <= 0:
            continue
        last = out[-1] if out else None
        if last and last.document == document and last.step == step == 1 and last.stop == start:
            out[-1] = replace(last, count=last.count + count)
        else:
            out.append(Span(start, count, step, document, offset))
        offset += count
    return tuple(out)
