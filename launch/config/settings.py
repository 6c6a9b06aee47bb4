"""The resolved configuration as typed values; what can be wrong about a value alone is refused here."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from apb.clusters import Launcher, launcher
from apb.compress import Compressor, compressor
from apb.decode import decoder
from apb.decode.base import Decoder
from apb.decode.sampling import Sampling
from apb.draft.spec import DraftSpec, own_head
from apb.plan.memory import Generation
from apb.strategies import Strategy, strategy
from burst.errors import UserError, choose, in_range

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of texts",
}
T = TypeVar("T")


@dataclass(frozen=True)
class DecodeSettings:
    """conf/decode."""

    name: str
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]
    placement: Literal["sharded", "gathered", "auto"]
    graphs: bool
    decoder: Decoder
    draft: DraftSpec | None = None  # null where nothing is drafted with a head

    @property
    def answer(self) -> Generation:
        """What memory has to hold for it."""
        return Generation(self.max_new_tokens, self.decoder.tree_tokens, self.placement == "gathered")


@dataclass(frozen=True)
class BurstSettings:
    """conf/burst."""

    explain: bool
    nodes: int
    machine: str


@dataclass(frozen=True, kw_only=True)
class Basics:
    """What every verb that prefills has."""

    model: str
    config: Mapping[str, Any] | None  # of a model with random weights
    strategy: Strategy
    compress: Compressor | None
    cluster: Launcher
    dtype: str
    device: str
    out: str | None
    timeout_s: float
    max_positions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings(Basics):
    """conf/prompt.yaml; and what only some verbs take, with the defaults that the others leave it at."""

    decode: DecodeSettings
    chat: bool
    question_first: bool
    needle_depth: float
    chunk_tokens: int | Literal["auto"] | None = "auto"
    compare: bool = False
    context_tokens: int | None = None
    query_tokens: int = 64
    memory_gb: float | None = None
    burst: BurstSettings | None = None


def settle(config: Mapping[str, Any]) -> Settings:
    """Return the typed settings; raises UserError for a value of the wrong type or out of its range."""
    values = basics(config)
    values["decode"] = decode_settings(config["decode"], values["model"])
    if "burst" in config:
        values["burst"] = typed(BurstSettings, config["burst"], "burst.")
    settings = typed(Settings, values, "")
    chunk, decode = settings.chunk_tokens, settings.decode
    in_range("chunk_tokens", chunk, not isinstance(chunk, int) or chunk >= 1, "auto, null, or 1 and more")
    positions = settings.max_positions
    in_range("max_positions", positions, positions is None or 1 <= positions < 2**31, "1 or more")
    Sampling(decode.temperature, decode.top_p, decode.top_k, decode.seed)
    in_range("decode.max_new_tokens", decode.max_new_tokens, decode.max_new_tokens >= 1, "1 or more")
    in_range("decode.stop", list(decode.stop), all(decode.stop), "texts of at least one character")
    depth, memory = settings.needle_depth, settings.memory_gb
    in_range("needle_depth", depth, 0 <= depth <= 1, "0.0 to 1.0")
    in_range("memory_gb", memory, memory is None or (math.isfinite(memory) and memory > 0), "more than 0")
    tokens = settings.context_tokens
    in_range("context_tokens", tokens, tokens is None or tokens >= 1, "1 or more")
    return settings


def decode_settings(values: Mapping[str, Any], model: str) -> DecodeSettings:
    """Return the typed settings of conf/decode: what all decoders have, the decoder's own, and its draft head's."""
    shared = {f.name for f in dataclasses.fields(DecodeSettings)}
    heads = {f.name for f in dataclasses.fields(DraftSpec)}
    own = {key: value for key, value in values.items() if key == "name" or key not in shared | heads}
    made = {"decoder": _built(decoder, own, "decode"), "draft": None}
    if "head" in values:
        head = values["head"] or own_head(model)
        made["draft"] = typed(DraftSpec, {k: v for k, v in values.items() if k in heads} | {"head": head}, "decode.")
    return typed(DecodeSettings, {k: v for k, v in values.items() if k in shared} | made, "decode.")


def basics(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the values of Basics made and checked; raises UserError."""
    timeout = _convert(config["timeout_s"], float, "timeout_s")
    in_range("timeout_s", timeout, math.isfinite(timeout) and timeout > 0, "more than 0 seconds")
    return dict(config) | {
        "model": config["model"]["name"],
        "config": config["model"].get("config"),
        "strategy": _built(strategy, config["strategy"], "strategy"),
        "compress": chosen_compressor(config),
        "cluster": _built(launcher, config["cluster"], "cluster"),
    }


def chosen_compressor(config: Mapping[str, Any]) -> Compressor | None:
    """Return the compressor that the configuration names, None for the strategy's own; raises UserError."""
    given = config.get("compress")
    made: Compressor | None = _built(compressor, given, "compress") if given else None
    return made


def typed(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Make the dataclass ``cls`` of ``values`` by their declared types; raises UserError naming the key."""
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.name in values]  # type: ignore[arg-type]
    return cls(**{name: _convert(values[name], hints[name], f"{prefix}{name}") for name in fields})


def _built(make: Any, values: Mapping[str, Any], group: str) -> Any:
    options = {key: value for key, value in values.items() if key != "name"}
    kind = type(make(values["name"]))
    hints = typing.get_type_hints(kind)
    return make(values["name"], **{k: _convert(v, hints[k], f"{group}.{k}") for k, v in options.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
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
    if origin is float and number:
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
