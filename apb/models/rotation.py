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

Turn = Callable[[Any, nn.Module, Tensor, Any], Tensor]


class Rotation:
    """The rotary embedding of a decoder, and how its mixers turn by it; ``apb.models.probe`` finds out."""

    def __init__(self, base: nn.Module, mixers: Sequence[nn.Module]) -> None:
        self._rotary: Any = getattr(base, "rotary_emb", None)
        self._mixers, self._name = mixers, type(base).__name__
        self._by_type = self._rotary is not None and "layer_type" in inspect.signature(self._rotary.forward).parameters
        self.still: set[int] = set()  # mixers that leave positions out
        self.unlike: set[int] = set()  # mixers whose queries or keys depend on positions in another way
        self._turns: dict[int, Turn] = {}

    def on(self, x_BHSD: Tensor, delta: int | Tensor, mixer: int) -> Tensor:
        """Return a mixer's queries or keys turned on by ``delta`` positions: one number, or (S,) whole numbers.

        Raises UserError where that is not all that positions do to them.
        """
        if mixer in self.still:
            return x_BHSD
        self.check(mixer)
        return self._turned_on(x_BHSD, delta, mixer, self._turns[mixer])

    def check(self, mixer: int) -> None:
        """Raise UserError where positions do more to a mixer's queries or keys than turn them."""
        if mixer not in self.still and (mixer in self.unlike or mixer not in self._turns):
            raise UserError(
                "queries and keys of this model cannot be turned on to other positions: RoPE is not all that they see",
                given=f"{self._name}, mixer {mixer}",
                allowed="exact strategies, and star, which needs no compressor",
                remedy="Set strategy=ring, or another of these.",
            )

    def learn(self, x_BHSD: Tensor, delta: int, mixer: int, wanted_BHSD: Tensor, tolerance: float) -> None:
        """Find out how a mixer turns ``x_BHSD`` on by ``delta`` to what is wanted; if nohow it is ``unlike``."""
        known = self._turns.get(mixer)
        for turn in (_whole, _rotary_part, _complex, _last_part, _last_complex) if known is None else (known,):
            try:
                mine = self._turned_on(x_BHSD, delta, mixer, turn)
            except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):  # made of other functions
                continue
            if mine.shape == wanted_BHSD.shape and float((mine - wanted_BHSD).abs().max()) <= tolerance:
                self._turns[mixer] = turn
                return
        self.unlike.add(mixer)

    def turned(self, x_BHSD: Tensor, at_BS: Tensor, rotary: nn.Module | None = None) -> Tensor:
        """Return what is not rotated yet at its positions; by another rotary embedding where one is given.

        A model without any rotates nothing.
        """
        if rotary is None and self._rotary is None:
            return x_BHSD
        mixer, turn = next(iter(self._turns.items()), (0, _whole))
        return turn(self._angles(x_BHSD, at_BS, mixer, rotary), self._mixers[mixer], x_BHSD, 1.0)

    def _turned_on(self, x_BHSD: Tensor, delta: int | Tensor, mixer: int, turn: Turn) -> Tensor:
        # A number is filled in on the device: copying it there would wait for the device.
        by = delta if isinstance(delta, Tensor) else torch.full((1,), delta, device=x_BHSD.device)
        # cos and sin carry the scaling of YaRN and its like; it is in x already.
        name = f"{self._type(mixer)}_attention_scaling" if self._by_type else "attention_scaling"
        angles = self._angles(x_BHSD, by.reshape(1, -1), mixer)
        return turn(angles, self._mixers[mixer], x_BHSD, getattr(self._rotary, name, 1.0))

    def _angles(self, x: Tensor, at_BS: Tensor, mixer: int, rotary: nn.Module | None = None) -> Any:
        embed = self._rotary if rotary is None else rotary
        return embed(x, at_BS, self._type(mixer)) if self._by_type else embed(x, at_BS)

    def _type(self, mixer: int) -> Any:
        module: Any = self._mixers[mixer]
        return getattr(module, "layer_type", None) or getattr(module, "attention_type", None)


def _whole(angles: Any, module: nn.Module, x_BHSD: Tensor, scaling: Any) -> Tensor:
    """Turn by the model's own function, which leaves dimensions beyond the rotary ones alone."""
    cos, sin = angles
    apply: Callable[..., Any] = sys.modules[type(module).__module__].apply_rotary_pos_emb
    single = "x" in inspect.signature(apply).parameters  # Gemma 4 turns queries and keys one by one
    cos, sin = cos / scaling, sin / scaling
    turned: Tensor = apply(x_BHSD, cos, sin) if single else apply(x_BHSD, x_BHSD, cos, sin)[0]
    return turned


def _rotary_part(angles: Any, module: nn.Module, x_BHSD: Tensor, scaling: Any) -> Tensor:
    """Turn the rotary dimensions where the model's function takes nothing else (Phi)."""
    rotary = angles[0].shape[-1]
    turned_BHSR = _whole(angles, module, x_BHSD[..., :rotary], scaling)
    return torch.cat([turned_BHSR, x_BHSD[..., rotary:]], dim=-1)


def _complex(angles: Any, module: nn.Module, x_BHSD: Tensor, scaling: Any) -> Tensor:
    """Turn neighbouring numbers as complex ones (Llama 4)."""
    apply: Callable[..., Any] = sys.modules[type(module).__module__].apply_rotary_emb
    x_BSHD = x_BHSD.transpose(1, 2)
    turned_BSHD: Tensor = apply(x_BSHD, x_BSHD, angles / scaling)[0]
    return turned_BSHD.transpose(1, 2)


def _last_part(angles: Any, module: nn.Module, x_BHSD: Tensor, scaling: Any) -> Tensor:
    """Turn the last dimensions, by halves also where pairs were neighbours: what is turned once has them in halves
    (latent attention)."""
    first = x_BHSD.shape[-1] - angles[0].shape[-1]
    return torch.cat([x_BHSD[..., :first], _whole(angles, module, x_BHSD[..., first:], scaling)], dim=-1)


def _last_complex(angles: Any, module: nn.Module, x_BHSD: Tensor, scaling: Any) -> Tensor:
    """Turn the last dimensions, neighbouring numbers as complex ones (DeepSeek-V2)."""
    first = x_BHSD.shape[-1] - 2 * angles.shape[-1]
    apply: Callable[..., Any] = sys.modules[type(module).__module__].apply_rotary_emb
    turned_BHSR: Tensor = apply(x_BHSD[..., first:], x_BHSD[..., first:], angles / scaling)[0]
    return torch.cat([x_BHSD[..., :first], turned_BHSR], dim=-1)
