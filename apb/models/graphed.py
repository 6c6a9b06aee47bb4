"""A model whose decode steps run as graphs.

Shapes: S tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from apb.attention.base import Attention
from apb.graphs.capture import Capture, Cut, Pieces
from apb.layers.call import Call
from apb.models.adapter import Adapter
from apb.models.hooks import active_features
from apb.models.lengths import agreed_length

_Found = tuple[Tensor | None, dict[int, Tensor]]  # logits, and the features by tap


class _Cutting:
    """Attention that ends a piece."""

    needs_projections = False

    def __init__(self, cut: Cut) -> None:
        self._cut = cut

    def __call__(self, call: Call) -> Tensor:
        return self._cut(call)


class GraphedAdapter(Adapter):
    """One host's view of a loaded model: steps of the sizes given to ``only`` run as graphs, others as ever.

    Captured at the first step of each size. Hosts that share a model have graphs of their own.
    """

    def __init__(self, adapter: Adapter, capture: Capture) -> None:
        self.__dict__ |= adapter.__dict__
        self._sizes: Set[int] = frozenset()
        self._adapter, self._capture = adapter, capture
        self._pieces: dict[tuple[int, bool, tuple[int, ...] | None, bool], Pieces[_Found]] = {}

    def only(self, sizes: Set[int]) -> None:
        """Run steps of these numbers of tokens as graphs; graphs of other sizes are given up."""
        self._sizes = sizes
        self._pieces = {key: pieces for key, pieces in self._pieces.items() if key[0] in sizes}

    def run(self, ids_S: Tensor, positions_S: Tensor, attention: Attention, chunk: int | None = None) -> None:
        """As ``Adapter.run``."""
        if chunk is None and self._fits(ids_S, attention):
            self._step(ids_S, positions_S, attention, wanted=False)
        else:
            super().run(ids_S, positions_S, attention, chunk)

    def _logits(self, ids_S: Tensor, positions_S: Tensor, attention: Attention, keep: int) -> Tensor:
        if not self._fits(ids_S, attention) or keep != len(ids_S):
            return super()._logits(ids_S, positions_S, attention, keep)
        logits_SV = self._step(ids_S, positions_S, attention, wanted=True)
        assert logits_SV is not None
        return logits_SV.clone()

    def _fits(self, ids_S: Tensor, attention: Attention) -> bool:
        return len(ids_S) in self._sizes and not attention.needs_projections

    def _step(self, ids_S: Tensor, positions_S: Tensor, attention: Attention, wanted: bool) -> Tensor | None:
        features = active_features()
        taps = None if features is None else features.taps
        border, length = self.shape.rope_border, agreed_length()
        beyond = border is not None and length is not None and length > border
        key = len(ids_S), wanted, taps, beyond
        if key not in self._pieces:
            self._pieces[key] = self._captured(ids_S, positions_S, wanted, taps)
        logits_SV, parts = self._pieces[key]((ids_S, positions_S), attention)
        if features is not None:
            assert features.rows is None, "decode steps keep every row"
            features.parts.update({tap: part_SE.clone() for tap, part_SE in parts.items()})
        return logits_SV

    def _captured(
        self, ids_S: Tensor, positions_S: Tensor, wanted: bool, taps: tuple[int, ...] | None
    ) -> Pieces[_Found]:
        def step(ids_S: Tensor, positions_S: Tensor, cut: Cut) -> _Found:
            with self._adapter.capturing(taps) as features:
                if wanted:
                    return self._adapter.all_logits(ids_S, positions_S, _Cutting(cut)), features.parts
                self._adapter.run(ids_S, positions_S, _Cutting(cut))
                return None, features.parts

        return Pieces(step, (ids_S, positions_S), lambda call: call.blank(), self._capture)
