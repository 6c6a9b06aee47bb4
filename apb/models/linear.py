"""Linear layers of transformers' models: their convolution and recurrence handed to whatever stands in for attention.

Both are functions that a family's module looks up among its globals whenever a layer runs. They are replaced there,
once each, by functions that do what they did unless a call carries our keyword: models that are not ours, in the same
process too, never notice. Layers hand their keywords on to both, but not their number, so a hook notes that.

Shapes: B batch (1), S tokens, C channels, G key heads or groups, H value heads, K key dim, V value dim.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from apb.layers.linear import Linear, Recurrence
from apb.layers.mixing import ConvCall, ScanCall
from apb.layers.recurrences.base import Scan
from apb.layers.recurrences.delta import DeltaScan
from apb.layers.recurrences.mamba2 import Mamba2Scan
from apb.models.hooks import KEYWORD

_CONVOLUTION = "causal_conv1d_fn"
_SCANS: dict[str, Recurrence] = {
    "torch_chunk_gated_delta_rule": "delta",
    "chunk_kimi_delta_attention": "kda",
    "mamba2_chunk_scan": "mamba2",
}
_running = threading.local()  # the number of the mixer under way; virtual ranks are threads that share the model


def recurrence(module: nn.Module) -> Recurrence | None:
    """Return which recurrence a mixer is; None for one that is no linear layer, or one of a kind that is unknown."""
    if not isinstance(getattr(module, "conv1d", None), nn.Conv1d) or not hasattr(module, "layer_idx"):
        return None
    found = vars(sys.modules[type(module).__module__])
    names = [kind for name, kind in _SCANS.items() if name in found]
    return names[0] if len(names) == 1 and _CONVOLUTION in found else None


def linear_kind(module: nn.Module) -> Linear:
    """Return the sizes of a linear layer's mixer; AttributeError where it does not name them as its family does."""
    kind, conv, m = recurrence(module), cast(nn.Conv1d, module.conv1d), cast(Any, module)
    assert kind is not None
    if kind == "mamba2":
        sizes = (m.n_groups, m.num_heads, m.ssm_state_size, m.head_dim)
    elif kind == "kda":
        sizes = (m.num_heads, m.num_heads, m.head_dim, m.head_dim)
    else:
        sizes = (m.num_k_heads, m.num_v_heads, m.head_k_dim, m.head_v_dim)
    return Linear(kind, conv.in_channels, conv.kernel_size[0], *sizes, chunk=m.chunk_size if kind == "mamba2" else 64)


def hook_linear(module: nn.Module, number: int) -> None:
    """Let a linear layer's mixer, ``number`` in the model's order, hand over its convolution and its recurrence."""
    home = vars(sys.modules[type(module).__module__])
    for name, wrap in ((_CONVOLUTION, _convolution), *((scan, _wrapper(kind)) for scan, kind in _SCANS.items())):
        if name in home and not hasattr(home[name], "apb_original"):
            home[name] = wrap(home[name])

    def note(_module: nn.Module, _inputs: Any) -> None:
        _running.number = number

    module.register_forward_pre_hook(note)


def _wrapper(kind: Recurrence) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return _mamba2 if kind == "mamba2" else _delta


def _handing_over(original: Callable[..., Any], hand_over: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``original``, but for calls with our keyword, which ``hand_over`` gets with the stand-in first."""

    @functools.wraps(original)
    def call(*args: Any, **keywords: Any) -> Any:
        attention = keywords.pop(KEYWORD, None)
        return original(*args, **keywords) if attention is None else hand_over(attention, *args, **keywords)

    call.apb_original = original  # type: ignore[attr-defined]
    return call


def _convolution(original: Callable[..., Tensor]) -> Callable[..., Any]:
    def hand_over(
        attention: Callable[[ConvCall], Tensor],
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **_others: Any,
    ) -> Tensor:
        def convolve(x_BCS: Tensor) -> Tensor:
            return original(x_BCS, weight, bias, activation=activation)

        return attention(ConvCall(_running.number, hidden_states, convolve))

    return _handing_over(original, hand_over)


def _delta(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    def hand_over(
        attention: Callable[[ScanCall], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert initial_state is None, "states are ours"
        function = _own(query, original)
        scan = DeltaScan(query, key, value, g, beta, use_qk_l2norm_in_kernel, function)
        return _with_state(attention, scan, output_final_state)

    return _handing_over(original, hand_over)


def _mamba2(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    def hand_over(
        attention: Callable[[ScanCall], Tensor],
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **_others: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        assert initial_states is None, "states are ours"
        # In fp32, as mamba-ssm's kernels do: a stretch's decays must be those that its states were made with.
        wide = torch.float64 if dt.dtype == torch.float64 else torch.float32
        steps = dt.to(wide)
        if dt_bias is not None:
            steps = steps + dt_bias.to(wide)
        if dt_softplus:
            steps = nn.functional.softplus(steps)
        steps = steps.clamp(*dt_limit)
        scan = Mamba2Scan(hidden_states, steps, B, C, A, D, chunk_size, _own(hidden_states, original))
        found = _with_state(attention, scan, return_final_states)
        return found if return_final_states else found[0]

    return _handing_over(original, hand_over)


def _own(x: Tensor, original: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the model's function, but for fp64 models: transformers' compute in fp32, the scan written out here in
    their own type."""
    return None if x.dtype == torch.float64 else original


def _with_state(attention: Callable[[ScanCall], Tensor], scan: Scan, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Return the outputs, and something in the place of a state: caches that ask for one are told nothing."""
    out_BSHV = attention(ScanCall(_running.number, scan))
    return out_BSHV, out_BSHV.new_empty(0) if wanted else None
