"""RoPE whose frequencies depend on the length of the sequence (LongRoPE): one length for all hosts and all passes.

transformers takes the length from the positions of each call, and hosts see different ones. A run says which length was
agreed on; of two copies of the model's rotation one always takes the short frequencies, one the long ones, so threads
that share the model may run sequences of both kinds at once.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_run = threading.local()  # virtual ranks are threads


@contextlib.contextmanager
def agreed(length: int | None) -> Iterator[None]:
    """Rotate in this thread as for a sequence of ``length`` tokens; None: as for the positions of each call."""
    before = agreed_length()
    _run.length = length
    try:
        yield
    finally:
        _run.length = before


def agreed_length() -> int | None:
    """Return the length that this thread rotates for."""
    length: int | None = getattr(_run, "length", None)
    return length


def rotate_as_agreed(decoder: nn.Module, border: int | None) -> None:
    """Let a decoder's rotations follow the agreed length; ``border``: the most tokens with the short frequencies."""
    if border is None:
        return
    for rotary in [m for m in decoder.modules() if "longrope" in str(getattr(m, "rope_type", ""))]:
        rotary.forward = _Rotation(rotary, border)


class _Rotation:
    """A rotation's forward, by the agreed length. Copies are no submodules: no weights and no state dict has them."""

    def __init__(self, rotary: nn.Module, border: int) -> None:
        self._own, self._border = rotary.forward, border
        self._short, self._long = _settled(rotary, 0), _settled(rotary, border)
        # Without what chooses the frequencies by positions, which would wait for the device.
        decorated: Any = type(rotary).forward
        self._rotate = getattr(decorated, "__wrapped__", decorated)

    def __call__(self, x: Tensor, position_ids: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
        length = agreed_length()
        found: tuple[Tensor, Tensor]
        if length is None:
            found = self._own(x, position_ids, *options, **named)
        else:
            rotary = self._long if length > self._border else self._short
            found = self._rotate(rotary, x, position_ids, *options, **named)
        return found


def _settled(rotary: nn.Module, position: int) -> nn.Module:
    """Return a copy that has the frequencies of a sequence up to this position."""
    made, kinds = copy.deepcopy(rotary), rotary.rope_type
    device = next(rotary.buffers()).device
    for options in [(kind,) for kind in kinds] if isinstance(kinds, dict) else [()]:
        made(torch.zeros(1, device=device), torch.tensor([[position]], device=device), *options)
    return made
