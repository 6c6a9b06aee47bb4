"""A head with the vocabulary that it drafts from.

Shapes: V draft vocabulary, W whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from apb.draft.base import DraftHead
from apb.draft.vocab import adapt


@dataclass(frozen=True, eq=False)
class Draft:
    """A head ready to draft. ``ranked_W``: the ids that it can draft by frequency, for vocabularies that adapt to a
    prompt; else None. ``own_bits``: those ids as a bitmap; None: all."""

    head: DraftHead
    ranked_W: Tensor | None = None
    stop_ids: tuple[int, ...] = ()
    own_bits: Tensor | None = None

    def adapted(self, bits: Tensor) -> DraftHead:
        """Return the head drafting from as many ids, those of a prompt's bitmap (ceil(W / 8),) among them."""
        assert self.ranked_W is not None
        size, vocab = len(self.head.ids_V), self.head.target.shape.vocab
        if self.own_bits is not None:
            bits = bits & self.own_bits.to(bits.device)
        return self.head.with_vocab(adapt(self.ranked_W, bits, size, vocab, self.stop_ids))
