"""Handles: references to caches on the hosts, which prefills and forks return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from apb.decode.score import Score
from apb.prompt.prompt import Prompt, Question, Text
from burst.errors import UserError


class Caches(Protocol):
    """The calls of an engine that a handle passes on."""

    def fork(self, handle: KVHandle, query: Text | Question | None = None) -> KVHandle: ...

    def gather(self, handle: KVHandle, rank: int = 0) -> KVHandle: ...

    def logits(self, handle: KVHandle) -> Tensor: ...

    def score(self, handle: KVHandle, token_ids: Sequence[int], first: int = 0) -> Score: ...

    def release(self, handle: KVHandle) -> None: ...

    def dropped(self, handle_id: str, epoch: int) -> None: ...


@dataclass
class KVHandle:
    """A KV cache on the engine's hosts. ``locate`` says where a token's KV is; ``metrics`` say what it cost.

    A handle that nobody refers to any more is released with the engine's next call.

    ``exact``: whether the context's KV equals full attention's. ``conditioned_on``: the question whose tokens stood in
    anchors, drove the selection or stand before the document; None when the cache serves every question alike.
    """

    engine: Caches = field(repr=False)
    id: str
    prompt: Prompt = field(repr=False)
    exact: bool
    conditioned_on: str | tuple[int, ...] | None
    blocks: tuple[tuple[int, int], ...]  # (host, context tokens) of every stretch in position order
    owner: int  # the host that keeps new KV and decides tokens
    epoch: int
    metrics: dict[str, Any] = field(repr=False)
    rope_length: int | None = (
        None  # tokens, answer included, that RoPE was told of; None where it does not depend on it
    )
    generated: list[int] = field(default_factory=list, repr=False)
    released: bool = False
    interrupted: bool = False  # an answer broke off half-way: hosts may disagree about where it stopped

    def __del__(self) -> None:
        # Runs at any time, in any thread, even within a call: so it only notes what there is to release.
        if not self.__dict__.get("released", True):
            self.engine.dropped(self.id, self.epoch)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The whole prompt and what was generated since."""
        return (*self.prompt.token_ids, *self.generated)

    @property
    def next_position(self) -> int:
        """Position of the next token to be decided."""
        return len(self.token_ids)

    @property
    def shards(self) -> tuple[int, ...]:
        """Cached tokens of every host that holds some, the deciding host last, with the tail."""
        held = Counter[int]()
        for host, length in self.blocks:
            held[host] += length
        own = held.pop(self.owner, 0) + self.next_position - sum(length for _, length in self.blocks)
        return (*held.values(), own)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (host, index in that host's part) of a position's KV; raises UserError beyond the cache.

        The last generated token has no KV yet: it is computed when generation goes on.
        """
        cached = self.next_position - bool(self.generated)
        start, held = 0, Counter[int]()
        for host, length in self.blocks:
            if 0 <= position < start + length:
                return host, held[host] + position - start
            start += length
            held[host] += length
        if not start <= position < cached:
            raise UserError(
                "no such position in this cache",
                given=position,
                allowed=f"0 to {cached - 1}",
                remedy="Ask for a position of the prompt or of generated text before its last token.",
            )
        return self.owner, held[self.owner] + position - start

    def fork(self, query: Text | Question | None = None) -> KVHandle:
        """Return a second cache over the same context: asked ``query`` instead, or (None) as this one stands now."""
        return self.engine.fork(self, query)

    def gather(self, rank: int = 0) -> KVHandle:
        """Return this cache merged on one host; decoding goes on there with the same tokens."""
        return self.engine.gather(self, rank)

    def logits(self) -> Tensor:
        """Return the next token's logits (V,), fp32 (fp64 for fp64 models); raises UserError when none are pending."""
        return self.engine.logits(self)

    def score(self, token_ids: Sequence[int], first: int = 0) -> Score:
        """Return how likely these tokens are after the prompt; the cache stays as it is. See Engine.score."""
        return self.engine.score(self, token_ids, first)

    def release(self) -> None:
        """Free the cache on all hosts."""
        self.engine.release(self)
