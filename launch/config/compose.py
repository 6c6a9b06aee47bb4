"""Composition of ``key=value`` words into one resolved configuration a run: Hydra's rules, our own errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from burst.errors import UserError, choose
from burst.registry import Option
from launch.config.composed import composed, known_keys, names
from launch.config.groups import GROUPS
from launch.config.schema import Configuration, Schema
from launch.config.texts import texts
from launch.config.words import parse, single


def compose(schema: Schema, words: Sequence[str], folder: Path | None = None) -> Configuration:
    """Return the configuration of a verb with words applied; ``folder``: a user's own presets.

    Raises UserError for unknown groups, choices and keys, with the nearest names, for unreadable values, and for
    presets that do not fit.
    """
    given = [(*word.partition("=")[::2], word) for word in words]
    groups = {group: names(group, folder) for group in [*schema.groups(), "experiment"]}
    groups |= {schema.root: list(schema.named)} if schema.named else {}
    picks: dict[str, str | None] = {}  # by group; None: null
    models = [value for key, value, word in given if key == "model" in groups and "=" in word]
    for key, value, word in given:
        if key == "model" in groups:
            picks[key] = value if value in groups["model"] else None
        elif key in groups and "=" in word:
            picked = single(parse(word)).value()
            null = picked is None and (key == "experiment" or _default(schema, key) is None)
            picks[key] = None if null else choose(key, str(picked), groups[key])
    base = composed(schema, [f"{group}={name}" for group, name in picks.items() if name is not None], folder)
    known = known_keys(schema, base)
    values, texts_given = base.values, dict[str, tuple[Option, str]]()
    for key, value, word in given:
        if key in groups and (key == "model" or "=" in word):
            continue
        if key not in known:
            if not re.fullmatch(r"[\w.]+", key):
                parse(word)  # which says what is wrong with +key, ~key and key@package
            raise _unknown(schema, key, known, groups, base)
        option = known[key]
        if option is not None and option.text:
            texts_given[key] = (option, value)
        else:
            _place(values, key, single(parse(word)).value())
    values = _resolved(values, words)
    for group, name in picks.items():
        if group == "model" and name is None:
            values[group] = {"name": models[-1]}
        elif name is None and group != "experiment":
            values[group] = None
    for key, (option, text) in texts_given.items():
        _place(values, key, _text(key, option, text))
    return Configuration(values, base.name)


def _default(schema: Schema, group: str) -> str | None:
    if group == schema.root:
        return schema.default
    return next(c.default for name in [None, *schema.named] for c in schema.choices(name) if c.group == group)


def _unknown(
    schema: Schema,
    key: str,
    known: Mapping[str, Option | None],
    groups: Mapping[str, Sequence[str]],
    base: Configuration,
) -> UserError:
    group, _, option = key.partition(".")
    if group in GROUPS and group in groups and option:
        kind = GROUPS[group]
        having = [c for c in kind.names() if option in [each.name for each in kind.options(c)]]
        name = (base.values.get(group) or {}).get("name")
        if having and name:
            return UserError(
                f"{group} '{name}' has no option '{option}'",
                given=key,
                allowed=", ".join(k for k in known if k.startswith(f"{group}.")) or f"no options for {group}={name}",
                remedy=f"Remove {key}, or choose {' or '.join(f'{group}={c}' for c in having)}.",
            )
        if having:
            return UserError(
                f"'{key}' belongs to a {group} choice that is not made",
                given=key,
                allowed=", ".join(f"{group}={c}" for c in having),
                remedy=f"Add {group}={having[0]}.",
            )
    ending = [k for k in known if k.endswith(f".{key}")]
    if ending:
        return UserError(
            f"unknown key '{key}'",
            given=key,
            allowed=", ".join(sorted([*known, *groups])),
            remedy=f"Did you mean {' or '.join(ending)}?",
        )
    try:
        choose("key", key, [*known, *groups])
    except UserError as error:
        return error
    raise AssertionError(key)


def _resolved(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the configuration with values that refer to others, ``${...}``, in their places."""
    if not any("${" in word for word in words):
        return values
    try:
        found = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"a value that refers to another cannot be found: {(str(error).splitlines() or [type(error).__name__])[0]}",
            given=" ".join(words),
            allowed="${KEY} with the key of another setting",
            remedy="Write the value itself.",
        ) from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _text(key: str, option: Option, text: str) -> Any:
    if "tuple" in str(option.hint):
        return texts(key, text)
    return None if text in ("", "null") else text


def _place(config: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    config[name] = value
