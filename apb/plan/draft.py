"""The draft head's share of a plan: the rows that hosts hand over to the one that drafts, their bytes and memory."""

from __future__ import annotations

from dataclasses import dataclass

Spans = tuple[tuple[int, int], ...]  # positions [start, stop), ascending


@dataclass(frozen=True)
class Handoff:
    """The plan of it. Rows in tokens, sizes in bytes; ``window`` None: the whole context."""

    window: int | None
    sinks: int
    kv_heads: int
    head_dim: int
    element_size: int
    bitmap_bytes: int  # which ids a host's tokens have; 0 when the vocabulary does not depend on the prompt
    feature_size: int  # numbers that the head reads of a token
    weight_bytes: int  # the head on every host, with its copy of the rows of the LM head that it drafts from
    adapted_bytes: int  # of such a copy for one prompt; 0 when the vocabulary does not depend on it

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's K and V in the head's one layer."""
        return 2 * self.kv_heads * self.head_dim * self.element_size

    def spans(self, held: Spans, context_len: int) -> Spans:
        """Return which of the positions that a host holds the drafting host wants.

        The context's last token is left out: its row depends on the question's first, which forks replace.
        """
        last = context_len - 1
        if self.window is None:
            wanted: Spans = ((0, last),)
        else:
            first = max(self.sinks, context_len - self.window)
            wanted = ((0, min(self.sinks, last)), (first, last))
        cuts = ((max(a, start), min(b, stop)) for start, stop in held for a, b in wanted)
        return tuple((a, b) for a, b in cuts if a < b)

    def rows(self, held: Spans, context_len: int) -> int:
        """Return how many those are."""
        return sum(b - a for a, b in self.spans(held, context_len))

    def sent(self, held: Spans, context_len: int) -> int:
        """Return the bytes that a host other than the drafting one sends."""
        return self.rows(held, context_len) * self.row_bytes + self.bitmap_bytes

    def feature_bytes(self, held: Spans, context_len: int) -> int:
        """Return the bytes of the features that a host keeps until it has made its rows of them."""
        return self.rows(held, context_len) * self.feature_size * self.element_size

    def cache_bytes(self, context_len: int, later: int) -> int:
        """Return the bytes of the drafting host's own cache with ``later`` tokens after the context."""
        rows = self.rows(((0, context_len),), context_len) + later
        return rows * self.row_bytes + self.bitmap_bytes + self.adapted_bytes


def positions(spans: Spans) -> list[int]:
    """Return the positions of spans."""
    return [at for start, stop in spans for at in range(start, stop)]
