"""A draft head over whole sequences as it will meet them: window and first positions, and several steps on its own.

Shapes: B batch, S tokens, E hidden size, H query heads, K kv heads, D head dim, T keys of all steps (S a step),
N tokens with a loss, V rows of the LM head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.draft.base import DraftHead, finished


def visible(positions_S: Tensor, window: int | None, sinks: int) -> Tensor:
    """Return who sees whom (S, S), bool: earlier tokens within the window, and the first positions."""
    back_SS = positions_S[:, None] - positions_S[None, :]
    seen_SS = back_SS >= 0
    return seen_SS if window is None else seen_SS & ((back_SS < window) | (positions_S < sinks)[None, :])


def unroll(head: DraftHead, hidden_BSE: Tensor, ids_BS: Tensor, positions_S: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield the head's output (B, S, E) on true features, then on its own outputs of one step, two steps, and so on.

    In the output of step s, row t has seen true features up to t - s and then its own, as a drafted token s levels
    below the root would. Source: the training-time test of EAGLE-3 (arXiv 2503.01840), here with EAGLE's features.
    """
    seen_SS = visible(positions_S, head.window, head.sinks)
    keys: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        mask_ST = torch.cat([seen_SS.tril(-step), *(_diagonal(seen_SS, step - r) for r in range(1, step + 1))], dim=1)
        mask_ST[:step, 0] = True  # rows before the first root: unused, but no softmax over nothing

        def attend(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_ST: Tensor = mask_ST) -> Tensor:
            keys.append((k_BKSD, v_BKSD))
            k_BKTD, v_BKTD = (torch.cat(parts, dim=2) for parts in zip(*keys, strict=True))
            return F.scaled_dot_product_attention(q_BHSD, k_BKTD, v_BKTD, attn_mask=mask_ST, enable_gqa=True)

        out_BSE = head.step(hidden_BSE, ids_BS, positions_S, attend)
        yield out_BSE
        hidden_BSE = torch.cat([hidden_BSE[:, :1], out_BSE[:, :-1]], dim=1)


def _diagonal(seen_SS: Tensor, below: int) -> Tensor:
    """Keep of who sees whom those that stand ``below`` rows apart."""
    return seen_SS.tril(-below) & ~seen_SS.tril(-below - 1)


_ROWS = 128  # tokens whose logits are formed at once: they stay in the processor's cache


class Divergence(torch.autograd.Function):
    """KL of the target's next-token distribution to the head's, both over some rows of the LM head.

    The gradient is formed with the loss, so that no logits are kept: ``(softmax(out) - softmax(feature)) @ rows``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out_NE: Tensor,
        feature_NE: Tensor,
        rows_VE: Tensor,
        bias_V: Tensor | None,
        scale: float,
        soft_cap: float | None,
    ) -> Tensor:
        """Return the divergence of each token (N,), fp32."""
        out_NE, feature_NE = out_NE.to(rows_VE.dtype), feature_NE.to(rows_VE.dtype)
        losses, grads = [], []
        for mine_NE, true_NE in zip(out_NE.split(_ROWS), feature_NE.split(_ROWS), strict=True):
            mine_logits_NV, true_logits_NV = (F.linear(x, rows_VE, bias_V) for x in (mine_NE, true_NE))
            if soft_cap is not None:  # bent logits need no further scale
                mine_logits_NV, true_logits_NV = (
                    finished(x, scale, soft_cap) for x in (mine_logits_NV, true_logits_NV)
                )
            rest = scale if soft_cap is None else 1.0
            mine_NV, mine_N = _softmax(mine_logits_NV, rest)
            true_NV, true_N = _softmax(true_logits_NV, rest)
            losses.append(
                torch.linalg.vecdot(true_NV, (true_logits_NV - mine_logits_NV).float()) * rest - true_N + mine_N
            )
            toward_NV = mine_NV.sub_(true_NV)
            if soft_cap is not None:  # the slope of the tangent
                toward_NV.mul_(1 - (mine_logits_NV.float() / soft_cap).square())
            grads.append(toward_NV.to(rows_VE.dtype) @ rows_VE)
        ctx.save_for_backward(torch.cat(grads).float().mul_(scale))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the head's outputs."""
        (grad_NE,) = ctx.saved_tensors
        return grad_NE * grads[0][:, None], None, None, None, None, None


def _softmax(logits_NV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return probabilities and the logarithm of their denominator (N,), fp32."""
    probs_NV = (logits_NV if scale == 1.0 else logits_NV * scale).softmax(-1, dtype=torch.float32)
    best_N1 = probs_NV.argmax(-1, keepdim=True)
    logs_N1 = logits_NV.gather(1, best_N1).float() * scale - probs_NV.gather(1, best_N1).log()
    return probs_NV, logs_N1[:, 0]
