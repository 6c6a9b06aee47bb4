"""Values of a configuration made into those of a dataclass, by the types that its fields declare."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from burst.errors import UserError, choose
from burst.registry import Registry

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of texts",
}
_MOST = 1e308  # whole numbers beyond it are no floats
T = TypeVar("T")


def typed(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Make the dataclass ``cls`` of ``values`` by their declared types; raises UserError naming the key."""
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.name in values]  # type: ignore[arg-type]
    return cls(**{name: convert(values[name], hints[name], f"{prefix}{name}") for name in fields})


def made(registry: Registry[Any], values: Mapping[str, Any]) -> Any:
    """Make the implementation that ``values`` name, with the options that they hold; raises UserError."""
    name = values["name"]
    hints = typing.get_type_hints(registry.get(name))
    given = {key: value for key, value in values.items() if key != "name"}
    registry.check(name, given)
    return registry.make(name, {k: convert(v, hints[k], f"{registry.key}.{k}") for k, v in given.items()})


def convert(value: Any, hint: Any, key: str) -> Any:
    """Return a value as its type declares it; raises UserError naming the key."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in arms:
        return None
    literals = [word for a in arms if typing.get_origin(a) is typing.Literal for word in typing.get_args(a)]
    if len(arms) > 1 and value in literals:
        return value
    (arm, *_) = (a for a in arms if a is not type(None))
    origin = typing.get_origin(arm) or arm
    if origin is typing.Literal:
        return choose(f"value of {key}:", str(value), typing.get_args(arm))
    if origin not in _WORDS:
        return value  # made here, not read
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin is float and number and not (isinstance(value, int) and abs(value) > _MOST):
        return float(value)
    element = typing.get_args(arm)[0] if origin is tuple else None
    if element is not None and isinstance(value, list) and all(type(v) is element for v in value):
        return tuple(value)
    if origin is int and isinstance(value, int) and number:
        return value
    if origin in (str, bool) and isinstance(value, origin):
        return value
    others = [*literals, *(["null"] if type(None) in arms else [])]
    words = "a list of whole numbers" if element is int else _WORDS[origin]
    allowed = " or ".join([words, *others])
    raise UserError(
        f"{key} must be {allowed}",
        given=f"{key}={value}",
        allowed=allowed,
        remedy=f"Write {key}=['a','b'], with quotes." if element is str else f"Change {key}.",
    )
