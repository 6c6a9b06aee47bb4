"""Tiny configurations of the families whose layers mix tokens in several ways."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB = 600
INIT = 0.15  # far from zero, so that wrong masks show; larger ones amplify roundings beyond 1e-4
WINDOW = 16  # of windows and chunks: far below a block of a long prompt, and above a block of a short one
FULL, LINEAR, SLIDING, CHUNKED = "full_attention", "linear_attention", "sliding_attention", "chunked_attention"

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "initializer_range": INIT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
WARM: dict[str, Any] = YARN | {"llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}
# Changes of a configuration after which the family must compute something else.
Changes = Mapping[str, Mapping[str, Any]]
WIDE: Changes = {"window": {"sliding_window": 4000}}


@dataclass(frozen=True)
class Family:
    """One family: its configuration, the kinds of its mixers in the model's order, and changes that must show.

    A feed-forward layer without a mixer has no kind, a layer with two mixers has two.
    """

    make: type
    options: Mapping[str, Any]
    kinds: tuple[str, ...]
    changes: Changes = field(default_factory=dict)
    without: tuple[str, ...] = ()  # names of BASE that this configuration does not know

    def config(self, **changes: Any) -> Any:
        """Return a new configuration."""
        base = {name: value for name, value in BASE.items() if name not in self.without}
        # Configurations keep, and change, the very lists and dicts that they are given.
        return self.make(**copy.deepcopy(base | dict(self.options) | changes))


def with_types(*types: str) -> dict[str, Any]:
    """Return options of layers of these types."""
    return {"num_hidden_layers": len(types), "layer_types": list(types)}


def layers(count: int) -> dict[str, Any]:
    """Return options of that many layers alike."""
    return {"num_hidden_layers": count}
