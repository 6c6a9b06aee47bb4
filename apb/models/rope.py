"""RoPE parameters of configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LASTING = ("rope_theta", "partial_rotary_factor")  # a model's own where others name none


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the RoPE parameters of a configuration: one set, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(found, dict):
        return []
    nested = [rope for rope in found.values() if isinstance(rope, dict)]
    return nested or ([found] if found else [])


def replaced(own: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return others' RoPE parameters in the form of a configuration's own: one set, or one for each type of layer."""
    if any(isinstance(rope, Mapping) for rope in own.values()):
        return {layer_type: replaced(rope, others) for layer_type, rope in own.items()}
    return {key: own[key] for key in _LASTING if key in own} | dict(others)
