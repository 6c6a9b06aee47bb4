"""The contract of everything that stands in for a model's mixers, and the layers of one host's prefill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, cast

from torch import Tensor

from apb.layers.base import LayerCache, LayerKind, LayerPrefill, Place, ShardedCache
from apb.layers.call import AttentionCall, Call
from apb.layers.linear import LinearPrefill
from apb.layers.linear_chunks import LinearChunks
from apb.plan.plan import PrefillPlan


class Attention(Protocol):
    """A stand-in for a model's mixers, called in the model's order; see ``apb.layers.call`` for what they ask."""

    needs_projections: bool

    def __call__(self, call: Call) -> Tensor:
        """Return the call's output."""
        ...


class Prefill(ABC):
    """One host's layers during a prefill: it runs those that are not sharded, and ``kept`` has the caches of all.

    Subclasses attend in the sharded ones. ``on_layer`` hears of each mixer that is done.
    """

    needs_projections = False

    def __init__(self, plan: PrefillPlan, place: Place, on_layer: Callable[[int], None]) -> None:
        self.kept: list[LayerCache] = []
        self._mixers, self._transport, self._kernel = plan.shape.mixers, place.transport, place.kernel
        self._on_layer = on_layer
        self._runs: list[LayerPrefill | None] = []
        segments = plan.segments(place.transport.rank)
        for kind in self._mixers:
            reads = None if kind.reads is None else self.kept[kind.reads]
            run = None if kind.sharded else kind.prefill(segments, place, reads)
            self._runs.append(run)
            self.kept.append(kind.cache(reads) if run is None else run.cache)

    def __call__(self, call: Call) -> Tensor:
        """Run one mixer's call and return its output."""
        run = self._runs[call.layer]
        if run is not None:
            out = run(call)
        else:
            assert isinstance(call, AttentionCall)
            out = self._attend(call, self._mixers[call.layer], cast("ShardedCache", self.kept[call.layer]))
        if call.ends:
            self.finished(call.layer)
        return out

    def chunks(self, layer: int) -> LinearChunks:
        """Return the run of a linear layer over chunks; ``layer``: its number."""
        run = self._runs[layer]
        assert isinstance(run, LinearPrefill)
        return run.chunks()

    def finished(self, layer: int) -> None:
        """Hear that a mixer is done."""
        self._on_layer(layer)

    @abstractmethod
    def _attend(self, call: AttentionCall, kind: LayerKind, cache: ShardedCache) -> Tensor:
        """Fill the cache of a sharded layer and return the call's output (B, S, H, E)."""
