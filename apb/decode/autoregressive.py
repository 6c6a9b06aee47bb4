"""One token at a time over a cache that may lie on many hosts: the owner decides, all follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apb.decode.base import GO_ON, Decoded, Decoding, forward

_TOKEN_BITS = 32  # what the owner tells of the end stands above the token's own bits


@dataclass(frozen=True)
class Autoregressive:
    """The decoder without drafts, whose tokens the others must give too."""

    name = "autoregressive"
    needs_head = False
    needs_history = False
    tree_tokens = 1

    def generate(self, decoding: Decoding) -> Decoded:
        """Decode; a stop token ends the list of ids."""
        d, cache = decoding, decoding.cache
        while True:
            if cache.undecoded is not None:
                forward(d.adapter, d.kernel, d.transport, cache, [cache.undecoded])
                cache.undecoded = None
            word = torch.zeros(1, dtype=torch.int64, device=d.transport.device)
            if d.decides:
                assert cache.logits is not None
                (token,), ending = d.cut([d.choose(cache.logits, position=cache.length)])
                word[0] = token | ending << _TOKEN_BITS
            d.transport.broadcast(word, cache.owner, kind="token", step=f"token {len(d.ids)}").wait()
            ending, token = divmod(int(word), 1 << _TOKEN_BITS)
            d.take([token])
            if ending != GO_ON:
                return d.finished(ending)
