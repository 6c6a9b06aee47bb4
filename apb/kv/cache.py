"""One host's part of a KV cache: the context block it keeps, and on one host the tail that grows.

Shapes: B batch (1), S new tokens, T cached tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from apb.kv.layer import LayerKV


class Tail:
    """The KV of tokens that came after the context, in buffers that grow by doubling."""

    def __init__(self, layers: int) -> None:
        self._buffers: list[LayerKV | None] = [None] * layers
        self._lengths = [0] * layers

    def __len__(self) -> int:
        return self._lengths[-1]

    def view(self, layer: int) -> LayerKV | None:
        """Return the layer's cached part without copying; None when there is nothing."""
        kv, n = self._buffers[layer], self._lengths[layer]
        return None if kv is None or not n else LayerKV(kv.k_BKTD[:, :, :n], kv.v_BKTD[:, :, :n])

    def append(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor) -> None:
        """Add new tokens' keys and values."""
        n, new = self._lengths[layer], k_BKSD.shape[2]
        kv = self._buffers[layer]
        if kv is None or n + new > kv.k_BKTD.shape[2]:
            kv = self._buffers[layer] = self._grown(kv, n, max(64, 2 * n, n + new), k_BKSD)
        kv.k_BKTD[:, :, n : n + new] = k_BKSD
        kv.v_BKTD[:, :, n : n + new] = v_BKSD
        self._lengths[layer] = n + new

    def truncate(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""
        self._lengths = [min(n, length) for n in self._lengths]

    def keep(self, length: int, rows: Sequence[int]) -> None:
        """Forget what comes after the first ``length`` tokens but for ``rows``, counted from there, ascending."""
        if list(rows) != list(range(len(rows))):
            for kv in self._buffers:
                assert kv is not None
                index = torch.tensor(rows, device=kv.k_BKTD.device) + length
                for x in (kv.k_BKTD, kv.v_BKTD):  # index_select copies before rows are overwritten
                    x[:, :, length : length + len(rows)] = x.index_select(2, index)
        self.truncate(length + len(rows))

    def copy(self) -> Tail:
        """Return an independent copy."""
        out = Tail(len(self._buffers))
        for layer in range(len(self._buffers)):
            kv = self.view(layer)
            if kv is not None:
                out.append(layer, kv.k_BKTD, kv.v_BKTD)
        return out

    @staticmethod
    def _grown(old: LayerKV | None, used: int, capacity: int, like: Tensor) -> LayerKV:
        b, heads, _, d = like.shape
        new = LayerKV(like.new_empty(b, heads, capacity, d), like.new_empty(b, heads, capacity, d))
        if old is not None:
            new.k_BKTD[:, :, :used] = old.k_BKTD[:, :, :used]
            new.v_BKTD[:, :, :used] = old.v_BKTD[:, :, :used]
        return new


class DraftRows(Protocol):
    """A draft head's own part of a cache, on the host that drafts; ``apb.draft.cache`` implements it."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers whose input the head reads; empty: the final norm's output."""
        ...

    def copy(self) -> DraftRows:
        """Return an independent copy."""
        ...

    def restart(self) -> None:
        """Forget everything after the context."""
        ...

    def observe(self, features_SF: Tensor, token_ids: Sequence[int], start: int) -> None:
        """Add decided tokens by their features; the first is at ``start``."""
        ...


@dataclass
class HostCache:
    """One host's part of one cache. ``members`` hold parts of its context; the owner's tail grows."""

    context: list[LayerKV]  # by layer; shared between forks, never written to; empty when not a member
    members: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]  # context positions [start, stop) of each member's rows
    tail: Tail
    length: int  # tokens with KV, context and tail: the next token's position
    logits: Tensor | None = None  # (V,) of the next token, on the owner
    undecoded: int | None = None  # the last decided token when its KV is not in the cache yet
    rope_length: int | None = None  # that the model rotates for; None where its RoPE does not depend on it
    draft: DraftRows | None = None  # on the owner, where the engine has a draft head

    @property
    def owner(self) -> int:
        """The host that decides tokens and keeps the new KV: the last member."""
        return self.members[-1]

    @property
    def block_lens(self) -> tuple[int, ...]:
        """Context tokens that each member holds."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self.spans)

    @property
    def context_len(self) -> int:
        """Tokens of the context, on all hosts together."""
        return sum(self.block_lens)

    def fork(self) -> HostCache:
        """Return a copy that decodes on independently; the context is shared."""
        return replace(self, tail=self.tail.copy(), draft=self.draft.copy() if self.draft is not None else None)
