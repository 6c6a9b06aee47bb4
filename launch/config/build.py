"""A resolved configuration made into settings; what can be wrong about a value alone is rejected here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from apb.clusters import CLUSTERS
from apb.compress import COMPRESSORS, Compressor
from apb.decode import DECODERS
from apb.draft.spec import DraftSpec, own_head
from apb.strategies import STRATEGIES
from burst.registry import options
from launch.config.settings import BurstSettings, DecodeSettings, Settings
from launch.config.typed import convert, made, typed

S = TypeVar("S", bound=Settings)


def settle(kind: type[S], config: Mapping[str, Any]) -> S:
    """Return the settings of ask or plan; raises UserError for a value of the wrong type or out of its range."""
    values = basics(config)
    values["decode"] = decode_settings(config["decode"], values["model"])
    if "burst" in config:
        values["burst"] = typed(BurstSettings, config["burst"], "burst.")
    return typed(kind, values, "")


def decode_settings(values: Mapping[str, Any], model: str) -> DecodeSettings:
    """Return the settings of ``decode``: what all decoders have, the decoder's own, and its draft head's."""
    drafts = DECODERS.get(values["name"]).needs_head
    shared = {each.name for each in options(DecodeSettings)}
    heads = {each.name for each in options(DraftSpec)} if drafts else set()
    taken = {*shared, *heads, *(["head"] if drafts else [])}
    own = {key: value for key, value in values.items() if key not in taken}
    parts: dict[str, Any] = {"name": values["name"], "decoder": made(DECODERS, own)}
    if drafts:
        head = convert(values["head"], str | None, "decode.head") or own_head(model)
        parts["draft"] = typed(DraftSpec, {k: v for k, v in values.items() if k in heads} | {"head": head}, "decode.")
    return typed(DecodeSettings, {k: v for k, v in values.items() if k in shared} | parts, "decode.")


def basics(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the values of Basics made and checked; raises UserError."""
    return dict(config) | {
        "model": config["model"]["name"],
        "config": config["model"].get("config"),
        "strategy": made(STRATEGIES, config["strategy"]),
        "compress": chosen_compressor(config),
        "cluster": made(CLUSTERS, config["cluster"]),
    }


def chosen_compressor(config: Mapping[str, Any]) -> Compressor | None:
    """Return the compressor that the configuration names, None for the strategy's own; raises UserError."""
    given = config.get("compress")
    chosen: Compressor | None = made(COMPRESSORS, given) if given else None
    return chosen
