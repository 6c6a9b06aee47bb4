"""Forward hooks that let a layer's raw projections and what passes between layers be seen; idle ones cost nothing.

Shapes: B batch, S tokens, E hidden size, F feature width.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apb.layers.rows import Projections
from burst.errors import UserError

KEYWORD = "apb_attention"  # under which a model is handed what stands in for its mixers
_NAMES = "qkv"
FINAL = -1  # the final norm's output among the features
# Projections of the layer under way, and features; virtual ranks are threads, so each has its own.
_captured = threading.local()


@dataclass
class Features:
    """Features of tokens that run through the model, for a draft head.

    ``taps``: the layers whose input it reads; empty: the final norm's output. ``rows``: of these tokens only."""

    taps: tuple[int, ...]
    rows: Tensor | None = None
    parts: dict[int, Tensor] = field(default_factory=dict)

    @property
    def value_SF(self) -> Tensor:
        """The features (S, F), taps side by side."""
        return torch.cat([self.parts[tap] for tap in self.taps or (FINAL,)], dim=-1)

    def keep(self, tap: int, hidden_BSE: Tensor) -> None:
        """Copy what passes a tap: layers may go on to write over it."""
        if tap in (self.taps or (FINAL,)):
            rows_SE = hidden_BSE[0]
            self.parts[tap] = rows_SE.clone() if self.rows is None else rows_SE.index_select(0, self.rows)


def active_features() -> Features | None:
    """Return what this thread is keeping features in."""
    features: Features | None = getattr(_captured, "features", None)
    return features


@contextlib.contextmanager
def capturing(taps: tuple[int, ...] | None, rows: Tensor | None = None) -> Iterator[Features]:
    """Keep the features of the tokens that are run meanwhile, once; ``taps`` None keeps nothing."""
    features, before = Features(taps or (), rows), active_features()
    _captured.features = features if taps is not None else None
    try:
        yield features
    finally:
        _captured.features = before


@contextlib.contextmanager
def projecting(wanted: bool) -> Iterator[None]:
    """Keep the projections of each layer that runs meanwhile for ``take_projections``, where they are wanted."""
    if wanted:
        _captured.slot = {}
    try:
        yield
    finally:
        _captured.slot = None


@contextlib.contextmanager
def placed(positions_S: Tensor) -> Iterator[None]:
    """Tell attention where the tokens that are run meanwhile stand."""
    before = active_positions()
    _captured.positions_S = positions_S
    try:
        yield
    finally:
        _captured.positions_S = before


def active_positions() -> Tensor | None:
    """Return where the tokens that this thread is running stand."""
    positions_S: Tensor | None = getattr(_captured, "positions_S", None)
    return positions_S


def take_projections() -> Projections | None:
    """Return the projections of the layer under way; None where they are not kept.

    Raises UserError where the layer has none of its own, or others than its queries, keys and values.
    """
    slot: dict[str, Tensor] | None = getattr(_captured, "slot", None)
    if slot is None:
        return None
    found = [slot.pop(name, None) for name in _NAMES]
    lacking = [name for name, x in zip(_NAMES, found, strict=True) if x is None]
    if lacking:
        raise _unfit(f"a layer lacks {lacking[0]}_proj of the width of its heads")
    q_BSP, k_BSP, v_BSP = (x for x in found if x is not None)
    return Projections(q_BSP, k_BSP, v_BSP)


def hook_projections(module: nn.Module, widths: Sequence[int]) -> None:
    """Let an attention module's projections be kept; ``widths``: of q, k and v, which it may have in one."""

    def keep(names: str) -> Any:
        own = [widths[_NAMES.index(name)] for name in names]

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            slot = getattr(_captured, "slot", None)
            if slot is not None and output.shape[-1] == sum(own):  # a gate may stand beside the queries
                slot.update(zip(names, output.split(own, dim=-1), strict=True))

        return hook

    for names in (*_NAMES, _NAMES):
        projection = getattr(module, f"{names}_proj", None)
        if projection is not None:
            projection.register_forward_hook(keep(names))


def _unfit(why: str) -> UserError:
    return UserError(
        f"this model's queries, keys and values cannot be shown before RoPE: {why}",
        given="a compressor that reads raw projections",
        allowed="models whose full layers have q_proj, k_proj and v_proj, or qkv_proj, and nothing else in them",
        remedy="Choose compress=norm, recent, snapkv or expected, or query where the prompt has a question.",
    )


def hook_features(base: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Let the input of each layer, and the decoder's output, be kept as features."""

    def tap(layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
            features = active_features()
            if features is not None:
                features.keep(layer, inputs[0] if inputs else given["hidden_states"])

        return hook

    def final(_module: nn.Module, _inputs: Any, output: Any) -> None:
        features = active_features()
        if features is not None:
            features.keep(FINAL, output.last_hidden_state)

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(tap(number), with_kwargs=True)
    base.register_forward_hook(final)
