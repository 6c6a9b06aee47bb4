"""Typed data as bytes: a JSON header, then the raw bytes of tensors and of long runs of whole numbers.

What arrives can only become data: plain values, tensors, the dataclasses that a codec was made with, and registered
plug-ins, which travel as kind, name and options. Nothing in it names code to import or to call.
"""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import json
import math
import struct
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from burst.errors import HostFailure, UserError
from burst.registry import Registry

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_HEAD = struct.Struct("<I")
_RUN = 32  # whole numbers in a row from which on they travel as int64


class Malformed(ValueError):
    """Bytes that no codec of this version wrote."""


def reachable(roots: Iterable[type[Any]]) -> list[type[Any]]:
    """Return the dataclasses ``roots`` and all that their fields are declared to hold; plug-ins are none of them."""
    found = {cls.__name__: cls for cls in roots}
    due = list(found.values())
    while due:
        hints = list(typing.get_type_hints(due.pop(), localns=dict(found)).values())
        while hints:
            hint = hints.pop()
            hints += typing.get_args(hint)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not inspect.isabstract(hint):
                assert found.get(hint.__name__, hint) is hint, f"two classes named {hint.__name__}"
                if hint.__name__ not in found:
                    found[hint.__name__] = hint
                    due.append(hint)
    return list(found.values())


class Codec:
    """Encodes and decodes values made of ``classes`` (dataclasses) and of what ``registries`` hold, by kind."""

    def __init__(self, classes: Iterable[type[Any]], registries: Iterable[Registry[Any]]) -> None:
        self._classes = {cls.__name__: cls for cls in classes}
        self._registries = {registry.kind: registry for registry in registries}

    def encode(self, value: Any) -> bytes:
        """Return the value's bytes; raises UserError for a plug-in that is registered nowhere."""
        buffers: list[bytes] = []
        tree = self._tree(value, buffers)
        head = json.dumps([tree, [len(b) for b in buffers]], separators=(",", ":"), allow_nan=False).encode()
        return b"".join((_HEAD.pack(len(head)), head, *buffers))

    def decode(self, data: bytes) -> Any:
        """Return the value of what ``encode`` wrote; raises Malformed for anything else."""
        try:
            (length,) = _HEAD.unpack_from(data)
            start = _HEAD.size + length
            tree, sizes = json.loads(data[_HEAD.size : start])
            buffers = []
            for size in sizes:
                buffers.append(data[start : start + size])
                start += size
            if start != len(data) or any(len(b) != size for b, size in zip(buffers, sizes, strict=True)):
                raise Malformed("the parts do not add up to the whole")
            return self._value(tree, buffers)
        except Malformed:
            raise
        except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as e:
            raise Malformed(f"{type(e).__name__}: {e}") from e
        except struct.error as e:
            raise Malformed(str(e)) from e

    # -- to JSON -----------------------------------------------------------------------------------------------

    def _tree(self, value: Any, buffers: list[bytes]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind in (tuple, list):
            return self._sequence(value, buffers)
        if isinstance(value, Mapping):
            return {"dict": [[self._tree(k, buffers), self._tree(v, buffers)] for k, v in value.items()]}
        if isinstance(value, Tensor):
            held = value.detach().cpu().contiguous()
            raw = bytes(held.reshape(-1).view(torch.uint8).numpy()) if held.numel() else b""
            return {"tensor": [str(held.dtype).removeprefix("torch."), list(held.shape), _put(raw, buffers)]}
        if isinstance(value, Exception):
            return {"error": self._error(value, buffers)}
        if dataclasses.is_dataclass(kind):
            fields = {f.name: self._tree(getattr(value, f.name), buffers) for f in dataclasses.fields(value) if f.init}
            if self._classes.get(kind.__name__) is kind:
                return {"class": [kind.__name__, fields]}
            return {"plugin": [*self._registered(value), fields]}
        raise AssertionError(f"a {kind.__name__} does not travel")

    def _sequence(self, value: Any, buffers: list[bytes]) -> Any:
        kind = type(value).__name__
        if len(value) >= _RUN and all(type(item) is int for item in value):
            try:
                return {"run": [kind, _put(struct.pack(f"<{len(value)}q", *value), buffers)]}
            except struct.error:  # beyond int64
                pass
        return {kind: [self._tree(item, buffers) for item in value]}

    def _registered(self, value: Any) -> tuple[str, str]:
        name = getattr(value, "name", None)
        for kind, registry in self._registries.items():
            if isinstance(name, str) and name in registry and registry.get(name) is type(value):
                return kind, name
        raise UserError(
            f"a {type(value).__name__} cannot be sent to other processes: it is registered under no name",
            given=type(value).__qualname__,
            allowed=f"what is registered as {' or '.join(self._registries)}",
            remedy="Register the class, and name its module among the package's entry points.",
        )

    def _error(self, error: Exception, buffers: list[bytes]) -> list[Any]:
        notes = list(getattr(error, "__notes__", []))
        if isinstance(error, UserError):
            shown = [error.message, _plain(error.given), _plain(error.allowed), error.remedy]
            return ["UserError", [self._tree(x, buffers) for x in shown], notes]
        if isinstance(error, HostFailure):
            return ["HostFailure", [error.message, error.rank, error.step, error.peer], notes]
        own = getattr(builtins, type(error).__name__, None) is type(error) and not isinstance(error, UnicodeError)
        if own:
            return [type(error).__name__, [_plain(x) for x in error.args], notes]
        return ["", [f"{type(error).__name__}: {error}"], notes]

    # -- from JSON ---------------------------------------------------------------------------------------------

    def _value(self, tree: Any, buffers: list[bytes]) -> Any:
        if not isinstance(tree, dict):
            if isinstance(tree, list):
                raise Malformed("a bare list")
            return tree
        ((tag, held),) = tree.items()
        match tag:
            case "float":
                return float(held)
            case "tuple":
                return tuple(self._value(item, buffers) for item in held)
            case "list":
                return [self._value(item, buffers) for item in held]
            case "dict":
                return {self._value(k, buffers): self._value(v, buffers) for k, v in held}
            case "run":
                numbers = struct.unpack(f"<{len(buffers[held[1]]) // 8}q", buffers[held[1]])
                return list(numbers) if held[0] == "list" else numbers
            case "tensor":
                return _tensor(held[0], held[1], buffers[held[2]])
            case "class":
                return self._classes[held[0]](**{name: self._value(v, buffers) for name, v in held[1].items()})
            case "plugin":
                cls = self._registries[held[0]].get(held[1])
                return cls(**{name: self._value(v, buffers) for name, v in held[2].items()})
            case "error":
                kind, args, notes = held
                return self._exception(kind, args, notes, buffers)
        raise Malformed(f"unknown tag {tag!r}")

    def _exception(self, kind: str, args: list[Any], notes: list[str], buffers: list[bytes]) -> Exception:
        error: Exception
        if kind == "UserError":
            message, given, allowed, remedy = (self._value(x, buffers) for x in args)
            error = UserError(message, given=given, allowed=allowed, remedy=remedy)
        elif kind == "HostFailure":
            message, rank, step, peer = args
            error = HostFailure(message, rank=rank, step=step, peer=peer)
        else:
            own = getattr(builtins, kind, RuntimeError) if kind else RuntimeError
            if not (isinstance(own, type) and issubclass(own, Exception)):
                raise Malformed(f"{kind} is no exception")
            error = own(*args)
        for note in notes:
            error.add_note(str(note))
        return error


def _put(raw: bytes, buffers: list[bytes]) -> int:
    buffers.append(raw)
    return len(buffers) - 1


def _plain(value: Any) -> Any:
    """Return a value as an error shows it: as it is when JSON has it, else as text."""
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _tensor(dtype: str, shape: list[int], raw: bytes) -> Tensor:
    kind = _DTYPES[dtype]
    if math.prod(shape) * kind.itemsize != len(raw) or any(type(n) is not int or n < 0 for n in shape):
        raise Malformed(f"{len(raw)} bytes are no {dtype} of shape {shape}")
    if not raw:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape)
