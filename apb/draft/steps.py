"""The draft head's steps: layer, LM head and log-probabilities, as graphs on CUDA devices.

Shapes: B batch (1), F rows, E hidden width, H query heads, D head dim, V draft vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from apb.draft.base import DraftHead, HeadAttend
from apb.graphs.capture import Capture, Cut, Pieces

_Found = tuple[Tensor, Tensor]


class HeadSteps:
    """Runs one head; with a ``capture`` as graphs, captured at the first step of each number of rows.

    What it returns, and what ``attend`` is given, is valid until anything else of the same ``capture`` runs: another
    step of any number of rows, or one of the model.
    """

    def __init__(self, head: DraftHead, capture: Capture | None = None) -> None:
        self.head, self._capture = head, capture
        self.computed = 0  # rows of the LM head, for all nodes together
        self._pieces: dict[int, Pieces[_Found]] = {}

    def __call__(self, hidden_BSE: Tensor, ids_BF: Tensor, positions_F: Tensor, attend: HeadAttend) -> _Found:
        """Return the head's output (1, F, E) and the log-probabilities (F, V), fp32, of what comes after each row."""
        rows = ids_BF.shape[1]
        self.computed += rows * len(self.head.ids_V)
        inputs = hidden_BSE, ids_BF, positions_F
        if self._capture is None:
            return self._step(*inputs, attend)
        if rows not in self._pieces:
            self._pieces[rows] = Pieces(self._step, inputs, lambda q_BHFD, *rest: q_BHFD.clone(), self._capture)
        return self._pieces[rows](inputs, attend)

    def _step(self, hidden_BSE: Tensor, ids_BF: Tensor, positions_F: Tensor, attend: Cut) -> _Found:
        out_BSE = self.head.step(hidden_BSE, ids_BF, positions_F, attend)
        return out_BSE, self.head.logits(out_BSE)[0].float().log_softmax(dim=-1)
