"""One token at a time over a cache that may lie on many hosts: the owner decides, all follow."""

from __future__ import annotations

from dataclasses import dataclass

from apb.decode.base import GO_ON, Decoded, Decoding, forward


@dataclass(frozen=True)
class Autoregressive:
    """The decoder without drafts, whose tokens the others must give too."""

    name = "autoregressive"
    needs_head = False
    needs_history = False
    tree_tokens = 1
    step_sizes = frozenset({1})

    def generate(self, decoding: Decoding) -> Decoded:
        """Decode; a stop token ends the list of ids."""
        d, cache = decoding, decoding.cache
        while True:
            if cache.undecoded is not None:
                forward(d.adapter, d.kernel, d.transport, cache, [cache.undecoded])
                cache.undecoded = None
            ending = d.decide()
            if ending != GO_ON:
                return d.finished(ending)
