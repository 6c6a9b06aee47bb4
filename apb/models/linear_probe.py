"""The probe of linear layers: a model's convolution and recurrence must be what exchanges and trees take them for.

Shapes: B batch (1), C channels, S tokens, R reach (kernel - 1), H value heads, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apb.layers.call import Call
from apb.layers.linear import Linear
from apb.layers.mixing import ConvCall, ScanCall
from apb.layers.recurrences.base import Scan
from apb.layers.recurrences.convolution import behind


def plainly(call: Call) -> Tensor:
    """Return what a linear layer's call gives where nothing comes before its tokens."""
    if isinstance(call, ConvCall):
        return call.convolve(call.x_BCS)
    assert isinstance(call, ScanCall)
    return call.scan.run(None)[0]


def by_itself(call: Call) -> Tensor:
    """Return what a linear layer's call gives where no token sees another."""
    return call.join([plainly(call.rows(row, row + 1)) for row in range(call.tokens)])


def unlike(call: Call, out: Tensor, kind: Linear, cut: int) -> str | None:
    """Say what of a call's output is not what the kind computes; ``cut``: a token that begins a second stretch."""
    if isinstance(call, ConvCall):
        return _unlike_convolution(call.x_BCS, out, call, kind, cut)
    assert isinstance(call, ScanCall)
    first, second = call.scan.rows(0, cut), call.scan.rows(cut, call.tokens)
    if call.scan.name != kind.family or first.run(None)[1].shape != kind.sizes.u:
        return "its state has not the sizes that the layer names"
    return _unlike_recurrence(first, second, out, call.scan.run(None)[1])


def _unlike_convolution(x_BCS: Tensor, out_BCS: Tensor, call: ConvCall, kind: Linear, cut: int) -> str | None:
    if x_BCS.shape[1] != kind.channels:
        return f"its convolution is over {x_BCS.shape[1]} channels, not {kind.channels}"
    reach = kind.kernel - 1
    later_BCS = behind(x_BCS[:, :, cut - reach : cut], x_BCS[:, :, cut:], call.convolve)
    return None if _alike(later_BCS, out_BCS[:, :, cut:]) else f"its convolution sees more than {reach} tokens before"


def _unlike_recurrence(first: Scan, second: Scan, out_BSHV: Tensor, end: Tensor) -> str | None:
    cut = first.tokens
    out_BSHV, (_, state) = out_BSHV[:, cut:], first.run(None)
    mapped = second.mapped()
    if not (_alike(mapped.corrected(state), out_BSHV) and _alike(mapped.affine.apply(state), end)):
        return "its recurrence does not go on from a state as a linear map"
    rows_S = torch.arange(second.tokens, device=state.device)
    closed_BSHV, pending = second.tree(state, rows_S[:, None] >= rows_S)
    if not (_alike(closed_BSHV, out_BSHV) and _alike(pending.commit(rows_S, state), end)):
        return f"its recurrence is not that of the kind '{first.name}'"
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    tolerance = max(1e-3, 16 * torch.finfo(b.dtype).eps) * float(b.abs().max())
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance
