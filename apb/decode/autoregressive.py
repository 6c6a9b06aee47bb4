"""One token at a time over a cache on one or many hosts: the owner decides, all follow."""

from __future__ import annotations

from dataclasses import dataclass

from apb.decode.base import DECODERS, GO_ON, Decoded, Decoder, Decoding, forward


@DECODERS.register("autoregressive", "one token at a time")
@dataclass(frozen=True)
class Autoregressive(Decoder):
    """The decoder without drafts, whose tokens the others must give too."""

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
