"""The draft head's own keys and values of decided tokens, on the host that drafts.

A head of one layer needs no attention for them: they are a function of a token's feature and the token after it. So
hosts make those of their own tokens in the prefill, and nothing is exchanged while decoding.

Shapes: B batch (1), S tokens, F feature width, E hidden width, H query heads, K kv heads, T rows, D head dim.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from apb.draft.draft import Draft
from apb.draft.steps import HeadSteps
from apb.draft.vocab import bitmap
from apb.layers.rows import LayerKV, Rows
from burst.kernels.reference import attend


class DraftCache:
    """Rows of pairs (feature of a token, id of the next) at the token's position, ascending; some may be missing.

    The pair of the context's last token is never there: its next token is the question's, which forks replace.
    """

    def __init__(
        self, draft: Draft, rows: LayerKV, positions: Sequence[int], context_rows: int, bits: Tensor | None
    ) -> None:
        """``rows`` at ``positions``; the first ``context_rows`` of them are the context's, which forks keep.

        ``bits``: which ids the context has, (ceil(W / 8),) uint8, for vocabularies that adapt.
        """
        self.draft, self.head, self.context_rows, self.bits = draft, draft.head, context_rows, bits
        self.later: set[int] = set()  # ids since the context
        self._adapted_to: Tensor | None = None  # the ids that the head's vocabulary was made for
        self._rows = Rows()
        self._positions = list(positions)
        self._pending_BSE: Tensor | None = None  # the last token's hidden state while its next one is not decided
        if positions:
            self._rows.append(rows.k_BKTD, rows.v_BKTE)

    @property
    def positions(self) -> Sequence[int]:
        """The rows' positions."""
        return self._positions

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers whose input the head reads; empty: the final norm's output."""
        return self.head.taps

    def copy(self) -> DraftCache:
        """Return an independent copy."""
        out = copy.copy(self)
        out._rows, out._positions, out.later = self._rows.copy(), list(self._positions), set(self.later)
        return out

    def restart(self) -> None:
        """Forget everything after the context."""
        self._rows.truncate(self.context_rows)
        del self._positions[self.context_rows :]
        self._pending_BSE = None
        self.later.clear()

    def adapt(self) -> None:
        """Draft from the ids of prompt and answers so far, and the most frequent ones; where the vocabulary adapts."""
        if self.bits is None:
            return
        seen = self.bits | bitmap(sorted(self.later), self.head.target.shape.vocab).to(self.bits.device)
        if self._adapted_to is None or not torch.equal(seen, self._adapted_to):
            self.head, self._adapted_to = self.draft.adapted(seen), seen

    def rows(self) -> LayerKV | None:
        """Return all rows, (1, K, T, D) each; None when there is none."""
        return self._rows.view()

    def observe(self, features_SF: Tensor, token_ids: Sequence[int], start: int) -> None:
        """Add the pairs of decided tokens, whose features the target's forward pass gave; the first is at ``start``."""
        self.later.update(token_ids)
        hidden_BSE = self.head.fuse(features_SF[None])
        ids, first = list(token_ids), start
        if self._pending_BSE is None:
            ids = ids[1:]
        else:
            hidden_BSE, first = torch.cat([self._pending_BSE, hidden_BSE], dim=1), start - 1
        self._pending_BSE = hidden_BSE[:, -1:]
        if ids:
            at_S = torch.arange(first, first + len(ids), device=hidden_BSE.device)
            ids_BS = torch.tensor([ids], device=hidden_BSE.device)
            self._append(*self.head.keys_values(hidden_BSE[:, :-1], ids_BS, at_S), first)

    def root(self, token: int, position: int, run: HeadSteps) -> tuple[Tensor, Tensor] | None:
        """Run the last token's pair, now that the next one is decided; return the head's output (1, 1, E) and the
        log-probabilities (1, V).

        ``position``: that of ``token``. None when the last token's feature is not here.
        """
        hidden_BSE, self._pending_BSE = self._pending_BSE, None
        if hidden_BSE is None:
            return None

        def attention(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
            self._append(k_BKSD, v_BKSD, position - 1)
            seen = self.visible(position)
            out_BHSD, _ = attend(q_BHSD, seen.k_BKTD, seen.v_BKTE, causal=False, scale=q_BHSD.shape[-1] ** -0.5)
            return out_BHSD

        device = hidden_BSE.device
        ids_BS, at_S = torch.tensor([[token]], device=device), torch.tensor([position - 1], device=device)
        return run(hidden_BSE, ids_BS, at_S, attention)

    def visible(self, position: int) -> LayerKV:
        """Return the rows that a draft under the token at ``position`` sees: sinks, and the window before it."""
        kv = self._rows.view()
        assert kv is not None
        if self.head.window is None:
            return kv
        first = bisect_left(self._positions, position - self.head.window)
        sinks = bisect_left(self._positions, self.head.sinks)
        if first <= sinks:
            return kv
        return LayerKV(
            torch.cat([kv.k_BKTD[:, :, :sinks], kv.k_BKTD[:, :, first:]], dim=2),
            torch.cat([kv.v_BKTE[:, :, :sinks], kv.v_BKTE[:, :, first:]], dim=2),
        )

    def _append(self, k_BKSD: Tensor, v_BKSD: Tensor, first: int) -> None:
        self._rows.append(k_BKSD, v_BKSD)
        self._positions += range(first, first + k_BKSD.shape[2])
