"""Tensors of one block of a role, and the flat buffers in which a block travels as one message.

Shapes: B batch, H query heads, K kv heads, S rows of a block, D head dim, E value dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from burst.kernels.merge import accumulate_dtype
from burst.schedules.payload import PAYLOAD, AttentionShape, Heads, Role, widths

Field = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of one tensor


@dataclass(frozen=True)
class Form:
    """The sizes and types of one call's tensors, as far as they do not depend on the rank.

    Gradients travel round rings in the type in which they are summed: fp32 (fp64 for fp64), so no hop rounds them.
    Back from head groups, where their sums end, they travel in the inputs' type unless ``accurate``.
    """

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    accurate: bool = False
    carried: tuple[int, int] | None = None  # widths of k and v on their way, where attention sees others

    @property
    def acc(self) -> torch.dtype:
        """The type of sums, of lse and of delta."""
        return accumulate_dtype(self.dtype)

    @property
    def partial(self) -> torch.dtype:
        """The type of partial outputs, and of gradients on their way back from head groups."""
        return self.acc if self.accurate else self.dtype

    def shape(self) -> AttentionShape:
        """Return the sizes that schedules count bytes with."""
        return AttentionShape(
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            batch=self.batch,
            element_size=self.dtype.itemsize,
            grad_size=self.acc.itemsize,
            state_size=self.acc.itemsize,
            partial_size=self.partial.itemsize,
            carried=self.carried,
        )

    def fields(self, role: Role, rows: int, heads: Heads | None) -> dict[str, Field]:
        """Return one block's tensors by name, in the message's order."""
        n_q, n_kv = (self.q_heads, self.kv_heads) if heads is None else (heads.q_count, heads.kv_count)
        dims = widths(self.head_dim, self.value_dim, self.carried)
        types = {"element": self.dtype, "gradient": self.acc, "state": self.acc, "partial": self.partial}
        return {
            part.name: ((self.batch, n_q if part.heads == "q" else n_kv, rows, *dims[part.dim]), types[part.kind])
            for part in PAYLOAD[role]
        }


def size(fields: Mapping[str, Field]) -> int:
    """Return the bytes of one block."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in fields.values())


def views(flat: Tensor, fields: Mapping[str, Field]) -> dict[str, Tensor]:
    """Return the block's tensors, which share ``flat``'s memory; ``flat`` is uint8 (bytes,), large enough."""
    out, start = {}, 0
    for name, (shape, dtype) in fields.items():
        stop = start + math.prod(shape) * dtype.itemsize
        out[name] = flat[start:stop].view(dtype).view(shape)
        start = stop
    return out


def pack(flat: Tensor, fields: Mapping[str, Field], tensors: Mapping[str, Tensor]) -> Tensor:
    """Copy tensors into one message, uint8 (bytes,), rounding where a field's dtype is narrower."""
    for name, target in views(flat, fields).items():
        target.copy_(tensors[name])
    return flat


class Scratch:
    """Flat buffers that one rank uses again from call to call: new memory costs more to touch than to fill.

    Keeps the ``KEPT`` buffers that were given back last, on CPU only: a GPU's allocator does so by itself.
    """

    KEPT = 8  # buffers; two double buffers of a forward and the sums of a backward

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, n: int, device: torch.device) -> Tensor:
        """Return memory for ``n`` bytes, uint8 (n,), with anything in it."""
        for i, flat in enumerate(self._free):
            if flat.numel() == n and flat.device == device:
                return self._free.pop(i)
        with torch.inference_mode(False):  # or a later call that is not inference could not write to it
            return torch.empty(n, dtype=torch.uint8, device=device)

    def give(self, buffers: Iterable[Tensor]) -> None:
        """Take buffers back. Nobody may hold a view of them any more."""
        kept = [flat for flat in buffers if flat.device.type == "cpu"]
        self._free = (kept + self._free)[: self.KEPT]


@cache
def _scratches() -> WeakKeyDictionary[object, Scratch]:
    return WeakKeyDictionary()


def scratch_of(owner: object) -> Scratch:
    """Return the scratch memory that belongs to ``owner`` and goes when it does."""
    return _scratches().setdefault(owner, Scratch())
