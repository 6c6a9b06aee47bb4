"""The contract of layer kinds: one layer's sizes as data, its exact work over hosts, and what it keeps.

A kind is a frozen dataclass of sizes, equal for equal layers, that travels with plans. ``sharded`` kinds (``full``,
``latent``) keep a context's rows with their owners, strategies may approximate them, and hosts merge partial outputs.
The others are exact by an exchange of their own, in the true order of tokens, and every host keeps what new tokens
need: all hosts run every new token, so a replica costs memory and no message.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from apb.layers.call import AttentionCall, Call
from apb.layers.rows import LayerKV
from apb.layers.sharding import Segment, Sharding
from apb.layers.tree import depths, visible
from burst.execution.blocks import Blocks
from burst.kernels import Kernel
from burst.registry import Registry
from burst.schedules import AttentionShape
from burst.transport import Transport

ALL_HEADS = slice(None)


@dataclass(frozen=True)
class Place:
    """Surroundings of a layer: the host's transport and its kernel."""

    transport: Transport
    kernel: Kernel


@dataclass(frozen=True)
class Step:
    """New tokens that every member of a cache runs.

    ``parents``: rows of a draft tree, -1 for its root; None where each token follows the one before it.
    """

    place: Place
    start: int  # position of the first token; of the root of a tree
    tokens: int
    members: tuple[int, ...]  # hosts that hold parts of the context
    owner: bool  # whether this host keeps new rows of sharded layers
    parents: tuple[int, ...] | None = None

    @cached_property
    def positions_M(self) -> Tensor:
        """Positions of the tree's rows, (M,): at their depths below the root."""
        assert self.parents is not None
        at = [self.start + depth for depth in depths(self.parents)]
        return torch.tensor(at, device=self.place.transport.device)

    @cached_property
    def seen_MM(self) -> Tensor:
        """Mask (M, M) of the rows of the tree that each of them sees, itself and its ancestors, bool."""
        assert self.parents is not None
        return visible(self.parents, self.place.transport.device)


class LayerCache(Protocol):
    """One host's part of one layer. Its context is never written to, and shared between forks."""

    def attend(self, call: Call, step: Step) -> Tensor:
        """Run new tokens over what is kept, and keep them; returns the call's output."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, ascending, of the tree that the last step ran."""
        ...

    def restart(self) -> None:
        """Forget everything after the context."""
        ...

    def fork(self, reads: LayerCache | None = None) -> LayerCache:
        """Return a copy that goes on independently; ``reads``: the copy of the cache that it reads, if it reads one."""
        ...


class ShardedCache(LayerCache, Protocol):
    """One host's part of one sharded layer: its rows of the context, and on the owner those after it."""

    @property
    def context(self) -> LayerKV: ...

    @property
    def tail(self) -> LayerKV | None: ...

    def fill(self, context: LayerKV) -> None:
        """Keep this host's rows of the context."""
        ...

    def append(self, kv: LayerKV) -> None:
        """Add rows after the context."""
        ...


class LayerPrefill(Protocol):
    """The run of one layer that is not sharded on one host during a prefill. ``cache`` is whole afterwards."""

    @property
    def cache(self) -> LayerCache: ...

    def __call__(self, call: Call) -> Tensor:
        """Return the output of all tokens of the pass."""
        ...


class LayerKind(ABC):
    """Kind and sizes of one layer's mixing of tokens; see the module. ``e``: bytes of a number of activations."""

    name: ClassVar[str]
    sharded: ClassVar[bool]
    part: ClassVar[str] = "attention"  # tables call the work of mixing so

    travels: ClassVar[str] = "kv"  # the ledger's kind of a sharded layer's rows in exact attention over hosts

    reads: int | None = None  # the mixer whose keys and values this layer reads, keeping none of its own

    # -- sharded kinds ----------------------------------------------------------------------------------------

    def attention_shape(self, e: int) -> AttentionShape:
        """Return what burst's schedules count rows, heads and bytes with."""
        raise NotImplementedError

    def row_bytes(self, e: int) -> int:
        """Return the bytes of what an owner keeps, and passes on, of one token; 0 for kinds that are not sharded."""
        return 0

    def cache(self, reads: LayerCache | None = None) -> LayerCache:
        """Return an empty cache of this layer; ``reads``: the cache of the layer that it reads, if it reads one."""
        raise NotImplementedError

    def blocks(self, call: AttentionCall, kernel: Kernel, heads: slice = ALL_HEADS) -> Blocks:
        """Return how a call's queries attend to rows; ``heads``: those that are worked on here."""
        raise NotImplementedError

    def partial_bytes(self, e: int) -> int:
        """Return the bytes of one new token's partial output to each peer; 0 for kinds that are not sharded."""
        return 0

    def query_bytes(self, e: int) -> int:
        """Return the bytes of one token's queries; 0 for kinds that are not sharded."""
        return 0

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query-key pair of one head; 0 for kinds that are not sharded."""
        return 0

    @property
    def expansion_flops(self) -> int:
        """FLOPs of making one key and value of one head of what travels; 0 for kinds that need not be expanded."""
        return 0

    def expansion_bytes(self, rows: int, e: int) -> int:
        """Return the bytes of so many keys and values while they are made and attended to, piece by piece."""
        return 0

    def scored_bytes(self, rows: int, e: int) -> int:
        """Return the bytes of what must be made of so many rows of a block to be scored."""
        return 0

    @property
    def heads(self) -> int:
        """Query heads; 0 for kinds that are not sharded."""
        return 0

    # -- the others -------------------------------------------------------------------------------------------

    def messages(self, sharding: Sharding, rank: int, e: int, kept: bool = True) -> dict[str, dict[int, int]]:
        """Return the bytes that a host sends to each peer while a sequence is prefilled, by the ledger's kind."""
        return {}

    def sent(self, sharding: Sharding, rank: int, e: int, kept: bool = True) -> dict[str, int]:
        """Return the bytes that a host sends while a sequence is prefilled, by the ledger's kind."""
        return {name: sum(peers.values()) for name, peers in self.messages(sharding, rank, e, kept).items()}

    @property
    def width(self) -> int:
        """Tokens that are mixed with one token in one call: the window, or a chunk of a scan."""
        return 0

    def flops(self, sharding: Sharding, rank: int) -> int:
        """Return the FLOPs of a host for mixing a sequence's tokens, projections left out."""
        return 0

    def held_bytes(self, context: int, e: int) -> int:
        """Return the bytes that every host keeps of a context of that many tokens."""
        return 0

    def workspace(self, sharding: Sharding, rank: int, e: int, together: int) -> int:
        """Return the bytes of a host that live only while one layer prefills a context: buffers, partial maps."""
        return 0

    def prefill(self, segments: Sequence[Segment], place: Place, reads: LayerCache | None = None) -> LayerPrefill:
        """Return the run of this layer over the segments of a pass; ``reads``: the cache of the layer that it reads."""
        raise NotImplementedError

    def tree_bytes(self, rows: int, e: int) -> int:
        """Return the bytes that a host keeps of a tree's rows, beside those of a tail, until some of them are kept."""
        return 0

    # -- all --------------------------------------------------------------------------------------------------

    @abstractmethod
    def tail_bytes(self, tokens: int, e: int, owner: bool) -> int:
        """Return the bytes that a host keeps of tokens after the context."""

    @abstractmethod
    def row_work_bytes(self, e: int) -> int:
        """Return the bytes of one token that live at once while the layer mixes: what it is given and gives."""

    def step_work_bytes(self, e: int) -> int:
        """Return the bytes of one new token that live at once while it runs over a cache."""
        return self.row_work_bytes(e)

    @abstractmethod
    def whole_row_bytes(self, e: int, exact: bool) -> int:
        """Return the bytes of one token that stay while the layer runs over chunks of the others.

        ``exact``: attention over hosts, whose output has memory of its own.
        """

    @property
    def rotary_dim(self) -> int:
        """Widest rotation of a head; 0 where nothing is rotated."""
        return 0

    @abstractmethod
    def step_flops(self, tokens: int, context: int, rank_tokens: int, owner: bool) -> int:
        """Return the FLOPs of a host for ``tokens`` new ones over a context of which it holds ``rank_tokens``."""


LAYERS: Registry[type[LayerKind]] = Registry("layer kind", "apb.layers", "layer")
