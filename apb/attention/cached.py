"""Attention of new tokens over the sharded cache: every host attends to its part, partial outputs are merged exactly.

Shapes: B batch (1), S new tokens, T cached tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apb.kv.cache import HostCache
from apb.kv.layer import LayerKV
from burst.kernels import Kernel
from burst.kernels.merge import Accumulator
from burst.kernels.reference import attend
from burst.transport import Transport


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
        """True on the owner, the host that decides tokens."""
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
