"""Graphs for tests on CPUs: operators are taped, and replayed into the very tensors that they filled when taped.

As with CUDA graphs nothing of Python runs again: numbers, shapes and addresses are those of the capture, values may not
be read inside, and a result lasts until the next replay. Replays begin by making what they are to fill NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apb.graphs.capture import Graph

# What a CUDA capture would end with an error at: reading values, and copies from the host.
FORBIDDEN = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "lift_fresh",
    "bernoulli",
)


class TapedGraph(TorchDispatchMode):
    """One piece."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape, self._over = tape, False
        self._calls: list[tuple[Any, Any, Any, list[Tensor], list[bool]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} cannot be captured")
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        filled = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = [x.untyped_storage()._cdata not in given for x in filled]
        if any(fresh) or func._schema.is_mutable:  # views need nothing: their memory stays
            self._calls.append((func, args, kwargs or {}, filled, fresh))
        return out

    def capture_end(self) -> None:
        if self._over:
            raise RuntimeError("the capture has ended")
        self._over = True
        self.__exit__(None, None, None)

    def replay(self) -> None:
        self._tape.replays += 1
        for *_, filled, fresh in self._calls:
            for x, is_fresh in zip(filled, fresh, strict=True):
                if is_fresh and x.is_floating_point():
                    x.fill_(float("nan"))
        for func, args, kwargs, filled, fresh in self._calls:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for x, new, is_fresh in zip(filled, again, fresh, strict=True):
                if is_fresh:
                    x.copy_(new)


class Tape:
    """Captures on tapes."""

    def __init__(self) -> None:
        self.replays = self.captures = 0

    @property
    @contextmanager
    def session(self) -> Iterator[None]:
        self.captures += 1
        yield

    def begin(self) -> Graph:
        graph = TapedGraph(self)
        graph.__enter__()
        return graph
