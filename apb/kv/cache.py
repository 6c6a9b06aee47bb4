"""One host's part of a cache: what each layer keeps there, and who holds which positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from apb.layers.base import LayerCache, LayerKind


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
    """One host's part of one cache. ``members`` hold parts of its context; the owner keeps what comes after it.

    Layers that are not sharded are alike on all members, and grow on all of them.
    """

    mixers: tuple[LayerKind, ...]
    layers: list[LayerCache]  # by mixer; empty when not a member
    members: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]  # context positions [start, stop) of each member's rows
    length: int  # tokens in the cache, context and tail: the next token's position
    logits: Tensor | None = None  # (V,) of the next token, on the owner
    undecoded: int | None = None  # the last decided token when it is not in the cache yet
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

    @property
    def tail_len(self) -> int:
        """Tokens after the context."""
        return self.length - self.context_len

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the tree that went through the model last."""
        for layer in self.layers:
            layer.keep(rows)

    def restart(self) -> None:
        """Forget everything after the context."""
        for layer in self.layers:
            layer.restart()
        self.length, self.logits, self.undecoded = self.context_len, None, None
        if self.draft is not None:
            self.draft.restart()

    def fork(self) -> HostCache:
        """Return a copy that decodes on independently; the context is shared."""
        draft = self.draft.copy() if self.draft is not None else None
        return replace(self, layers=forked(self.mixers, self.layers), draft=draft)


def forked(mixers: Sequence[LayerKind], layers: Sequence[LayerCache]) -> list[LayerCache]:
    """Return copies of all layers that go on independently; readers read the copies."""
    out: list[LayerCache] = []
    for kind, layer in zip(mixers, layers, strict=bool(layers)):
        out.append(layer.fork(None if kind.reads is None else out[kind.reads]))
    return out
