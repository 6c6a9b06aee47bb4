"""Attention of new tokens over the sharded cache: every host attends to its part, partial outputs are merged."""

from __future__ import annotations

from torch import Tensor

from apb.kv.cache import HostCache
from apb.layers.base import Place, Step
from apb.layers.call import Call
from burst.kernels import Kernel
from burst.transport import Transport


class CacheAttention:
    """Stands in for a model's mixers after the prefill: all members run the same new tokens, layer by layer.

    In sharded layers each contributes its part's output and LSE; the others are kept alike everywhere and send nothing.
    """

    needs_projections = False

    def __init__(
        self,
        cache: HostCache,
        transport: Transport,
        kernel: Kernel,
        start: int,
        tokens: int,
        parents: tuple[int, ...] | None = None,
    ) -> None:
        """``start``: position of the first of ``tokens`` new ones; ``parents``: of a draft tree's rows, else None."""
        assert transport.rank in cache.members
        self._layers = cache.layers
        self._step = Step(
            Place(transport, kernel), start, tokens, cache.members, transport.rank == cache.owner, parents
        )

    @property
    def decides(self) -> bool:
        """True on the owner, the host that decides tokens."""
        return self._step.owner

    def __call__(self, call: Call) -> Tensor:
        """Run one layer's new tokens over its cache, which keeps them."""
        return self._layers[call.layer].attend(call, self._step)
