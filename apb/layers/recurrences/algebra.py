"""The recurrence of a few tokens in closed form: chunks of a sequence, and trees whose rows see their ancestors.

With G the decays' sum on the path to a row and D_ij = e^{G_i - G_j} for ancestors and the row itself, else 0:
(I + A) u = beta (v - e^G k S), A_ij = beta_i (k_i . k_j) D_ij of ancestors alone; o = e^G q S + ((q k^T) * D) u; and
behind a path that ends in row l, S' = e^{G_l} S + sum_j e^{G_l - G_j} k_j u_j^T. Without beta (Mamba2) u = v.
Source: the chunk form of Gated DeltaNet (arXiv 2412.06464), section 3.3; the mask of ancestors is ours.

Shapes: B batch (1), H value heads, S rows, K key dim, V value dim, W decays a row (1 or K), P rows of a path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.layers.recurrences.base import CHUNK, Pending


@dataclass(frozen=True)
class Terms:
    """Terms of the closed form; queries scaled, keys normalised where the model does so, in the states' type."""

    q_BHSK: Tensor
    k_BHSK: Tensor
    v_BHSV: Tensor
    g_BHSW: Tensor  # logarithms of decays, at most 0
    beta_BHS: Tensor | None

    def rows(self, start: int, stop: int) -> Terms:
        """Return rows [start, stop)."""
        q, k, v, g = (x[:, :, start:stop] for x in (self.q_BHSK, self.k_BHSK, self.v_BHSV, self.g_BHSW))
        return Terms(q, k, v, g, None if self.beta_BHS is None else self.beta_BHS[:, :, start:stop])


@dataclass(frozen=True)
class PendingTerms(Pending):
    """A tree's writes to the state; ``turned``: states are (V, K)."""

    k_BHSK: Tensor
    u_BHSV: Tensor
    sum_BHSW: Tensor
    turned: bool = False

    def commit(self, rows_P: Tensor, state: Tensor) -> Tensor:
        """Return the state after a path from the root: its rows, ascending, at least one."""
        k_BHPK, u_BHPV, sum_BHPW = (x.index_select(2, rows_P) for x in (self.k_BHSK, self.u_BHSV, self.sum_BHSW))
        last_BH1W = sum_BHPW[:, :, -1:]
        written_BHKV = (k_BHPK * (last_BH1W - sum_BHPW).exp()).mT @ u_BHPV
        kept = last_BH1W.exp().mT
        return kept.mT * state + written_BHKV.mT if self.turned else kept * state + written_BHKV


def closed(terms: Terms, state_BHKV: Tensor, seen_SS: Tensor) -> tuple[Tensor, PendingTerms]:
    """Return the outputs (B, H, S, V) of rows over a state, and their writes; ``seen_SS``: ancestors and self."""
    sum_BHSW = seen_SS.to(terms.g_BHSW.dtype) @ terms.g_BHSW
    grown_BHSW = sum_BHSW.exp()
    u_BHSV = terms.v_BHSV
    if terms.beta_BHS is not None:
        beta_BHS1 = terms.beta_BHS[..., None]
        a_BHSS = beta_BHS1 * _pairs(terms.k_BHSK, terms.k_BHSK, sum_BHSW, seen_SS)  # its diagonal is taken for ones
        new_BHSV = beta_BHS1 * (terms.v_BHSV - (terms.k_BHSK * grown_BHSW) @ state_BHKV)
        u_BHSV = torch.linalg.solve_triangular(a_BHSS, new_BHSV, upper=False, unitriangular=True)
    scores_BHSS = _pairs(terms.q_BHSK, terms.k_BHSK, sum_BHSW, seen_SS)
    out_BHSV = (terms.q_BHSK * grown_BHSW) @ state_BHKV + scores_BHSS @ u_BHSV
    return out_BHSV, PendingTerms(terms.k_BHSK, u_BHSV, sum_BHSW)


def scanned(terms: Terms, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Run a sequence chunk by chunk; return the outputs (B, H, S, V) and the state after it."""
    out = []
    for start in range(0, terms.q_BHSK.shape[2], CHUNK):
        chunk = terms.rows(start, start + CHUNK)
        rows_S = torch.arange(chunk.q_BHSK.shape[2], device=state_BHKV.device)
        part_BHSV, pending = closed(chunk, state_BHKV, rows_S[:, None] >= rows_S)
        out.append(part_BHSV)
        state_BHKV = pending.commit(rows_S, state_BHKV)
    return torch.cat(out, dim=2), state_BHKV


def _pairs(a_BHSK: Tensor, k_BHSK: Tensor, sum_BHSW: Tensor, seen_SS: Tensor) -> Tensor:
    """Return (a_i . k_j) decayed from row j to row i, (B, H, S, S); rows that are not seen give zero."""
    between_BHSSW = (sum_BHSW[:, :, :, None] - sum_BHSW[:, :, None]).masked_fill(~seen_SS[..., None], -torch.inf).exp()
    if sum_BHSW.shape[-1] == 1:
        return (a_BHSK @ k_BHSK.mT) * between_BHSSW[..., 0]
    return torch.einsum("bhik,bhijk,bhjk->bhij", a_BHSK, between_BHSSW, k_BHSK)
