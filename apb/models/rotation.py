"""Rotation of queries and keys that are rotated already: RoPE of a model's own, by layer.

Shapes: B batch, H heads, S tokens, D head dim (R rotary, P not).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from burst.errors import UserError


class Rotation:
    """The rotary embedding of a decoder, and which of its mixers turn by it alone; ``apb.models.probe`` finds out."""

    def __init__(self, base: nn.Module, mixers: Sequence[nn.Module]) -> None:
        self._rotary: Any = getattr(base, "rotary_emb", None)
        self._mixers, self._name = mixers, type(base).__name__
        self._by_type = self._rotary is not None and "layer_type" in inspect.signature(self._rotary.forward).parameters
        self.still: set[int] = set()  # mixers that leave positions out
        self.unlike: set[int] = set()  # mixers whose queries or keys depend on positions in another way

    def on(self, x_BHSD: Tensor, delta: int | Tensor, mixer: int) -> Tensor:
        """Return a mixer's queries or keys turned on by ``delta`` positions: one number, or (S,) whole numbers.

        Raises UserError where that is not all that positions do to them.
        """
        if mixer in self.still:
            return x_BHSD
        if mixer in self.unlike:
            raise UserError(
                "queries and keys of this model cannot be turned on to other positions: RoPE is not all that they see",
                given=f"{self._name}, mixer {mixer}",
                allowed="exact strategies, and star, which needs no compressor",
                remedy="Set strategy=ring, or another of these.",
            )
        return self._turned_on(x_BHSD, delta, mixer)

    def turns(self, x_BHSD: Tensor, delta: int, mixer: int, wanted_BHSD: Tensor, tolerance: float) -> bool:
        """Return whether turning on by ``delta`` gives what is wanted."""
        try:
            mine = self._turned_on(x_BHSD, delta, mixer)
        except (
            AttributeError,
            TypeError,
            RuntimeError,
            KeyError,
        ):  # no such functions: its rotation is of another kind
            return False
        return mine.shape == wanted_BHSD.shape and float((mine - wanted_BHSD).abs().max()) <= tolerance

    def turned(self, x_BHSD: Tensor, at_BS: Tensor, rotary: nn.Module | None = None) -> Tensor:
        """Return what is not rotated yet at its positions; by another rotary embedding where one is given."""
        cos, sin = self._angles(x_BHSD, at_BS, 0, rotary)
        return self._applied(x_BHSD, cos, sin, 0)

    def _turned_on(self, x_BHSD: Tensor, delta: int | Tensor, mixer: int) -> Tensor:
        # A number is filled in on the device: copying it there would wait for the device.
        turn = delta if isinstance(delta, Tensor) else torch.full((1,), delta, device=x_BHSD.device)
        cos, sin = self._angles(x_BHSD, turn.reshape(1, -1), mixer)
        # cos and sin carry the scaling of YaRN and its like; it is in x already.
        name = f"{self._type(mixer)}_attention_scaling" if self._by_type else "attention_scaling"
        scaling = getattr(self._rotary, name, 1.0)
        return self._applied(x_BHSD, cos / scaling, sin / scaling, mixer)

    def _angles(self, x: Tensor, at_BS: Tensor, mixer: int, rotary: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        embed = self._rotary if rotary is None else rotary
        cos, sin = embed(x, at_BS, self._type(mixer)) if self._by_type else embed(x, at_BS)
        return cos, sin

    def _applied(self, x_BHSD: Tensor, cos: Tensor, sin: Tensor, mixer: int) -> Tensor:
        apply: Callable[..., Any] = sys.modules[type(self._mixers[mixer]).__module__].apply_rotary_pos_emb
        turning = cos.shape[-1]  # the dimensions beyond are never rotated
        x_BHSR, rest_BHSP = x_BHSD[..., :turning], x_BHSD[..., turning:]
        single = "x" in inspect.signature(apply).parameters  # Gemma 4 turns queries and keys one by one
        found = apply(x_BHSR, cos, sin) if single else apply(x_BHSR, x_BHSR, cos, sin)[0]
        rotated: Tensor = found
        return torch.cat([rotated, rest_BHSP], dim=-1) if rest_BHSP.shape[-1] else rotated

    def _type(self, mixer: int) -> Any:
        module: Any = self._mixers[mixer]
        return getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
