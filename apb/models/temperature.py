"""Llama-4's temperature: queries of layers without RoPE grow with their position, which its code counts from the call's
first token.

Shapes: B batch (1), S tokens, H query heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apb.models.hooks import active_positions


def by_temperature(module: nn.Module, q_BHSD: Tensor) -> Tensor:
    """Return queries scaled by their real positions where the module has scaled them by their rows.

    Source: arXiv 2501.19399, as in Llama 4: 1 + scale log(1 + floor((position + 1) / floor)).
    """
    tuned = getattr(module, "attn_temperature_tuning", False)
    if not tuned or getattr(module, "use_rope", True):
        return q_BHSD
    at_S = active_positions()
    assert at_S is not None and len(at_S) == q_BHSD.shape[2]
    rows_S = torch.arange(len(at_S), device=at_S.device)
    ratio_S = _factor(module, at_S) / _factor(module, rows_S)
    return (q_BHSD * ratio_S[:, None]).to(q_BHSD.dtype)


def _factor(module: nn.Module, at_S: Tensor) -> Tensor:
    scale, floor = float(module.attn_scale), float(module.floor_scale)  # type: ignore[arg-type]
    return torch.log1p(torch.floor((at_S.float() + 1.0) / floor)) * scale + 1.0
