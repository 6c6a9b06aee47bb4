"""The prefill's passes through the model: a host's anchor and blocks, in chunks or with the question behind them.

Shapes: S tokens of anchor and blocks, Q question tokens, F feature width of the draft head.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left

import torch
from torch import Tensor

from apb.attention.anchored import PrefillAttention, WithQuestion
from apb.attention.base import Prefill
from apb.attention.cached import CacheAttention
from apb.attention.chunked import LocalAttention
from apb.kv.cache import HostCache
from apb.layers.sharding import cut
from apb.models.adapter import Adapter
from apb.plan.plan import PrefillPlan


class Passes:
    """One host's tokens of a prefill; what the draft head takes over of their features comes back."""

    def __init__(
        self, adapter: Adapter, plan: PrefillPlan, rank: int, anchor_ids: tuple[int, ...], block_ids: tuple[int, ...]
    ) -> None:
        self._adapter, self._plan, self._host = adapter, plan, plan.host_plans[rank]
        device = adapter.device
        self._ids_S = torch.tensor(anchor_ids + block_ids, device=device)
        beside = (self._host.anchor_start, self._host.anchor_start + self._host.anchor_len)
        ranges = [torch.arange(start, stop, device=device) for start, stop in (beside, *self._host.spans)]
        self._positions_S = torch.cat(ranges)
        self._taps: tuple[int, ...] | None = None
        self._wanted: list[int] = []  # rows whose features are taken over, ascending
        if plan.draft is not None:
            assert adapter.draft is not None
            self._taps = adapter.draft.head.taps
            held, wanted = self._host.spans, plan.draft.spans(self._host.spans, plan.lengths.context)
            # The anchor's copies of these positions stand before the block's own tokens.
            firsts = itertools.accumulate((stop - start for start, stop in held), initial=self._host.anchor_len)
            self._wanted = [
                row
                for first, (start, stop) in zip(firsts, held, strict=False)
                for a, b in wanted
                if start <= a < stop
                for row in range(first + a - start, first + b - start)
            ]
        self._rows = torch.tensor(self._wanted, dtype=torch.int64, device=device)

    def blocks(self, attention: Prefill) -> Tensor | None:
        """Run anchor and blocks; return the features (rows, F), None without a draft head."""
        plan = self._plan
        if not isinstance(attention, LocalAttention):
            with self._adapter.capturing(self._taps, self._rows) as features:
                self._adapter.run(self._ids_S, self._positions_S, attention, plan.chunk_tokens)
            return features.value_SF if self._taps is not None else None
        assert plan.chunk_tokens is not None
        parts = []
        for start, stop in cut(self._host.block_len, plan.chunk_tokens):
            first, last = bisect_left(self._wanted, start), bisect_left(self._wanted, stop)
            inside = self._rows[first:last] - start
            with self._adapter.capturing(self._taps, inside) as features:
                self._adapter.run(self._ids_S[start:stop], self._positions_S[start:stop], attention)
            parts += [features.value_SF] if self._taps is not None else []
        return torch.cat(parts) if parts else None

    def with_question(
        self, attention: PrefillAttention, question: CacheAttention, cache: HostCache, query_ids: tuple[int, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run blocks and question in one pass; the last host keeps the last token's logits.

        Returns the blocks' features (rows, F) and the question's (Q, F); None without a draft head.
        """
        start, device, adapter = cache.length, self._ids_S.device, self._adapter
        cache.length += len(query_ids)
        ids = torch.cat([self._ids_S, torch.tensor(query_ids, device=device)])
        at = torch.cat([self._positions_S, torch.arange(start, cache.length, device=device)])
        asked = torch.arange(len(self._ids_S), len(ids), device=device)
        both = WithQuestion(attention, question, len(self._ids_S))
        with adapter.capturing(self._taps, torch.cat([self._rows, asked])) as features:
            if question.decides:
                cache.logits = adapter.logits(ids, at, both)
            else:
                adapter.run(ids, at, both)
        if self._taps is None:
            return None, None
        found = features.value_SF
        return found[: len(self._rows)], found[len(self._rows) :]
