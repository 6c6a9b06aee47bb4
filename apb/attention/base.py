"""The contract of everything that stands in for a model's mixers, and the layers of one host's prefill."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from apb.layers.base import LayerCache, LayerPrefill, Place
from apb.layers.call import Call
from apb.layers.linear import LinearPrefill
from apb.layers.linear_chunks import LinearChunks
from apb.plan.plan import PrefillPlan


class Attention(Protocol):
    """A stand-in for a model's mixers, called in the model's order; see ``apb.layers.call`` for what they ask."""

    needs_projections: bool

    def __call__(self, call: Call) -> Tensor:
        """Return the call's output."""
        ...


@runtime_checkable
class Prefilling(Attention, Protocol):
    """A stand-in during the prefill of a host's blocks, which may run in chunks."""

    def chunks(self, layer: int) -> LinearChunks:
        """Return the run of a linear layer over chunks; ``layer``: its number."""
        ...

    def finished(self, layer: int) -> None:
        """Hear that a layer which ran over chunks is done."""
        ...


class Layers:
    """One host's layers during a prefill: the runs of those that are not sharded, and the caches of all."""

    def __init__(self, plan: PrefillPlan, place: Place) -> None:
        self.caches: list[LayerCache] = []
        self._runs: list[LayerPrefill | None] = []
        segments = plan.segments(place.transport.rank)
        for kind in plan.shape.mixers:
            reads = None if kind.reads is None else self.caches[kind.reads]
            run = None if kind.sharded else kind.prefill(segments, place, reads)
            self._runs.append(run)
            self.caches.append(kind.cache(reads) if run is None else run.cache)

    def chunks(self, layer: int) -> LinearChunks:
        """Return the run of a linear layer over chunks."""
        run = self._runs[layer]
        assert isinstance(run, LinearPrefill)
        return run.chunks()

    def run(self, call: Call) -> Tensor | None:
        """Return the output of a layer that is not sharded; None for the others, which strategies run."""
        run = self._runs[call.layer]
        return None if run is None else run(call)
