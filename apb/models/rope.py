"""RoPE parameters of configurations."""

from __future__ import annotations

from typing import Any


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the RoPE parameters of a configuration: one set, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(found, dict):
        return []
    nested = [rope for rope in found.values() if isinstance(rope, dict)]
    return nested or ([found] if found else [])
