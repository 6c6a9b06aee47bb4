"""Choices made into a configuration, with Hydra; all keys that it can have."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from burst.errors import UserError
from burst.registry import Option
from launch.config.groups import GROUPS
from launch.config.schema import Configuration, Schema, defaults
from launch.config.source import hydra

_known: dict[tuple[str, tuple[str, ...], Path | None], Configuration] = {}  # the runs of a sweep share choices


def composed(schema: Schema, choices: Sequence[str], folder: Path | None) -> Configuration:
    """Return the configuration with these choices, words ``group=name``, and nothing else set.

    Raises UserError for presets that do not fit.
    """
    at = (schema.root, tuple(choices), folder)
    if at not in _known:
        _known[at] = _composed(schema, choices, folder)
    return copy.deepcopy(_known[at])


def names(group: str, folder: Path | None) -> list[str]:
    """Return what can be chosen in a group, a user's own presets included."""
    own = sorted(file.stem for file in (folder / group).glob("*.yaml")) if folder is not None else []
    return [*GROUPS[group].names(), *own]


def _composed(schema: Schema, words: Sequence[str], folder: Path | None) -> Configuration:
    try:
        with hydra(schema, folder):
            config = hydra_compose(schema.root, list(words), return_hydra_config=True)
        chosen = config.hydra.runtime.choices.get(schema.root)
        with open_dict(config):
            del config["hydra"]
        values = OmegaConf.to_container(config, resolve=True)
    except UserError:
        raise
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
    known = known_keys(schema, found)
    chosen = {schema.root, *(each.group for each in schema.choices(found.name))}
    for key in _keys({k: v for k, v in found.values.items() if v is not None or k not in chosen}):
        if key not in known:
            raise UserError(
                f"a preset sets '{key}', which this run does not have",
                given=" ".join(words) or schema.root,
                allowed=", ".join(sorted(known)),
                remedy="Choose another preset, or other choices beside it.",
            )


def known_keys(schema: Schema, found: Configuration) -> dict[str, Option | None]:
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
