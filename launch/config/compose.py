"""Composition of ``key=value`` words into one resolved configuration a run: Hydra's rules, our own errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from burst.errors import UserError, choose
from burst.registry import Option
from launch.config.groups import GROUPS
from launch.config.schema import Configuration, Schema, defaults
from launch.config.source import hydra, names
from launch.config.texts import texts
from launch.config.words import parse, single


def compose(schema: Schema, words: Sequence[str], folder: Path | None = None) -> Configuration:
    """Return the configuration of a verb with words applied; ``folder``: a user's own presets.

    Raises UserError for unknown groups, choices and keys, with the nearest names, for unreadable values, and for
    presets that do not fit.
    """
    given = [(*word.partition("=")[::2], word) for word in words]
    with hydra(schema, folder) as loader:
        groups = {group: names(group, folder) for group in [*schema.groups(), "experiment"]}
        groups |= {schema.root: list(schema.named)} if schema.named else {}
        model = next((value for key, value, _ in reversed(given) if key == "model"), None)
        picks: dict[str, str | None] = {}  # by group; None: null
        for key, value, word in given:
            if key == "model" and "model" in groups:
                picks[key] = value if value in groups["model"] else None
            elif key in groups and "=" in word:
                picked = single(parse(word, loader)).value()
                null = picked is None and (key == "experiment" or _default(schema, key) is None)
                picks[key] = None if null else choose(key, str(picked), groups[key])
        chosen = [f"{group}={name}" for group, name in picks.items() if name is not None]
        base = _composed(schema, chosen)
        known = _known(schema, base)
        settings, raw = [], {}
        for key, value, word in given:
            if key in groups and (key == "model" or "=" in word):
                continue
            if re.fullmatch(r"[\w.]+", key) and key not in known:
                raise _unknown(schema, key, known, groups, base)
            option = known.get(key)
            if option is not None and option.text and "=" in word:
                raw[key] = (option, value)
            else:
                settings.append(f"++{single(parse(word, loader)).input_line}")  # known, if not to every preset
        found = _composed(schema, chosen + settings) if settings else base
    values = found.values
    for group, name in picks.items():
        if group == "model" and name is None:
            values[group] = {"name": model}
        elif name is None and group != "experiment":
            values[group] = None
    for key, (option, text) in raw.items():
        _place(values, key, option, text)
    return found


def _default(schema: Schema, group: str) -> str | None:
    if group == schema.root:
        return schema.default
    return next(c.default for name in [None, *schema.named] for c in schema.choices(name) if c.group == group)


def _composed(schema: Schema, words: Iterable[str]) -> Configuration:
    words = list(words)
    try:
        config = hydra_compose(schema.root, words, return_hydra_config=True)
        chosen = config.hydra.runtime.choices.get(schema.root)
        with open_dict(config):
            del config["hydra"]
        values = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"the settings do not fit together: {(str(error).splitlines() or [type(error).__name__])[0]}",
            given=" ".join(words) or schema.root,
            allowed=f"the settings that 'apb {schema.root} --help' shows",
            remedy="Change the setting that is named.",
        ) from error
    assert isinstance(values, dict)
    found = Configuration({str(key): value for key, value in values.items()}, str(chosen) if chosen else None)
    _fill(schema, found, words)
    return found


def _fill(schema: Schema, found: Configuration, words: Sequence[str]) -> None:
    """Add the options that presets left out; raises UserError for keys of presets that this run does not have."""
    for each in schema.choices(found.name):
        values = found.values.get(each.group)
        if isinstance(values, dict) and each.group != "model":
            options = GROUPS[each.group].options(_name(each.group, values))
            found.values[each.group] = {k: v for k, v in values.items() if k == "name"} | defaults(options) | values
    known = _known(schema, found)
    chosen = {schema.root, *(each.group for each in schema.choices(found.name))}
    for key in _keys({k: v for k, v in found.values.items() if v is not None or k not in chosen}):
        if key not in known:
            raise UserError(
                f"a preset sets '{key}', which this run does not have",
                given=" ".join(words) or schema.root,
                allowed=", ".join(sorted(known)),
                remedy="Choose another preset, or other choices beside it.",
            )


def _known(schema: Schema, found: Configuration) -> dict[str, Option | None]:
    """Return every key that can be set, dotted, with its option; a group's ``name`` is set by choosing from it."""
    known: dict[str, Option | None] = dict(schema.options(found.name))
    for each in schema.choices(found.name):
        values = found.values.get(each.group)
        if not isinstance(values, dict):
            continue
        if each.group == "model":
            known |= dict.fromkeys(_keys(values, "model."))
        else:
            options = GROUPS[each.group].options(_name(each.group, values))
            known |= {f"{each.group}.{option.name}": option for option in options}
    return known


def _name(group: str, values: Mapping[str, Any]) -> str:
    """Return what a group's values are options of: a choice's own name, where it has one."""
    return str(values.get("name") or GROUPS[group].names()[0])


def _keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _keys(value, f"{prefix}{key}.")
        elif not (prefix and key == "name"):
            found.append(f"{prefix}{key}")
    return found


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


def _place(config: dict[str, Any], key: str, option: Option, text: str) -> None:
    value: Any = None if text in ("", "null") else text
    if "tuple" in str(option.hint):
        value = texts(key, text)
    group, _, name = key.partition(".")
    if name:
        config[group][name] = value
    else:
        config[key] = value
