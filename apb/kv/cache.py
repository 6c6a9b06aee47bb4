"""One host's part of a KV cache: the context block it keeps, and on one host the tail that grows.

Shapes: B batch (1), S new tokens, T cached tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burst.kernels import Kernel
from burst.kernels.reference import attend
from burst.merge import Accumulator
from burst.transport import Transport

if TYPE_CHECKING:
    from apb.draft.cache import DraftCache


@dataclass
class LayerKV:
    """Keys (rotated) and values of one layer."""

    k_BKTD: Tensor
    v_BKTD: Tensor


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


@dataclass
class HostCache:
    """What one host knows of one cache. ``members`` hold parts of its context; the owner's tail grows."""

    context: list[LayerKV]  # by layer; shared between forks, never written to; empty when not a member
    members: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]  # context positions [start, stop) of each member's rows
    tail: Tail
    length: int  # tokens with KV, context and tail: the next token's position
    logits: Tensor | None = None  # (V,) of the next token, on the owner
    undecoded: int | None = None  # the last decided token when its KV is not in the cache yet
    draft: DraftCache | None = None  # on the owner, where the engine has a draft head

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


class CacheAttention:
    """Stands in for a model's attention after the prefill: new tokens attend to every member's KV, merged exactly.

    All members run the same tokens; each contributes its part's output and LSE, in one message per peer and layer, and
    merges all of them in member order, so every host gets the same bits. Source: Star Attention, phase 2.
    """

    needs_projections = False

    def __init__(self, cache: HostCache, transport: Transport, kernel: Kernel, seen_SS: Tensor | None = None) -> None:
        """``seen_SS`` (bool): which of the new tokens each of them sees; None: itself and those before it."""
        assert transport.rank in cache.members
        self._cache, self._transport, self._kernel, self._seen_SS = cache, transport, kernel, seen_SS

    @property
    def decides(self) -> bool:
        """Whether this host is the owner."""
        return self._transport.rank == self._cache.owner

    def __call__(
        self, layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, projections: object
    ) -> Tensor:
        """Attend, and append the new tokens' KV on the owner; returns (B, S, H, D)."""
        cache, own = self._cache, Accumulator()
        context = cache.context[layer]
        own.add(*self._attend(q_BHSD, context, scale))
        if self.decides:
            earlier = cache.tail.view(layer)
            if earlier is not None:
                own.add(*self._attend(q_BHSD, earlier, scale))
            if self._seen_SS is None:
                own.add(*self._kernel(q_BHSD, k_BKSD, v_BKSD, causal=True, scale=scale))
            else:  # the only keys of a draft tree that need a mask are its own
                own.add(*attend(q_BHSD, k_BKSD, v_BKSD, causal=False, scale=scale, seen_ST=self._seen_SS))
            cache.tail.append(layer, k_BKSD, v_BKSD)
        out_BHSD, lse_BHS = own.finish(q_BHSD.dtype)
        if len(cache.members) > 1:
            out_BHSD = self._merge_all(out_BHSD, lse_BHS, f"layer {layer}: partial outputs")
        return out_BHSD.transpose(1, 2)

    def _attend(self, q_BHSD: Tensor, kv: LayerKV, scale: float) -> tuple[Tensor, Tensor]:
        """Attend to keys that every query sees. The heads of a group are rows of their kv head, so that a key is read
        once and not once a head: with few queries reading is all there is to it."""
        batch, heads, tokens, dim = q_BHSD.shape
        n_kv = kv.k_BKTD.shape[1]
        rows = q_BHSD.reshape(batch, n_kv, heads // n_kv * tokens, dim)
        out, lse = self._kernel(rows, kv.k_BKTD, kv.v_BKTD, causal=False, scale=scale)
        return out.reshape(q_BHSD.shape), lse.reshape(q_BHSD.shape[:3])

    def _merge_all(self, out_BHSD: Tensor, lse_BHS: Tensor, step: str) -> Tensor:
        own = _pack(out_BHSD, lse_BHS)
        parts = self._transport.all_gather(own, [own.shape] * self._transport.world, kind="partials", step=step).wait()
        merged = Accumulator()
        for part in parts:
            merged.add(*_unpack(part, out_BHSD.dtype, lse_BHS.dtype))
        return merged.finish(out_BHSD.dtype)[0]


def _pack(out_BHSD: Tensor, lse_BHS: Tensor) -> Tensor:
    """Put output and LSE side by side as bytes: one message instead of two."""
    return torch.cat([out_BHSD.contiguous().view(torch.uint8), lse_BHS.contiguous()[..., None].view(torch.uint8)], -1)


def _unpack(packed: Tensor, dtype: torch.dtype, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    split = packed.shape[-1] - lse_dtype.itemsize
    out, lse = packed[..., :split].contiguous(), packed[..., split:].contiguous()
    return out.view(dtype), lse.view(lse_dtype)[..., 0]
