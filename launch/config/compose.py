"""From ``key=value`` words to one resolved configuration a run: Hydra's composition, our own errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from burst.errors import UserError, choose
from launch.config.texts import texts

# Free text and paths: Hydra's grammar would stumble over spaces, commas, '=' and letters beyond ASCII.
RAW = (
    "model",
    "out",
    "start",
    "cluster.address",
    "compress.heads",
    "decode.stop",
    "decode.head",
    "decode.frequency",
    "bench.data",
    "bench.rates",
    "bench.results",
    "bench.readme",
    "bench.figure",
    "strategy.rates",
)
_OPTIONAL_GROUPS = ("bench", "compress")  # null in every root file


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return one list of overrides a run: the product of all sweeps (``a=1,2``, ``a=range(1,4)``), in order.

    Raises UserError for what Hydra's grammar does not take, and for sweeps that cannot be listed.
    """
    choices: list[list[str]] = []
    with _hydra() as loader:
        for word in overrides:
            key, _, value = word.partition("=")
            if _raw(word):
                models = key == "model" and not Path(value).is_dir() and value.split(",")
                choices.append([f"model={m}" for m in models] if models else [word])
                continue
            override = _parse(word, loader)
            if not override.is_sweep_override():
                choices.append([word])
                continue
            try:
                choices.append([f"{key}={text}" for text in override.sweep_string_iterator()])
            except HydraException as error:
                raise UserError(
                    f"the values of '{key}' cannot be listed: {error}",
                    given=word,
                    allowed=f"a list ({key}=a,b) or a range ({key}=range(1,5))",
                    remedy="Write the values out, with commas between them.",
                ) from error
    return [list(run) for run in itertools.product(*choices)]


def compose(root: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved configuration of the root file ``conf/<root>.yaml`` with overrides applied.

    Raises UserError for unknown groups, choices and keys, with the nearest names, and for unreadable values.
    """
    raw = {key: value for key, _, value in (o.partition("=") for o in overrides if _raw(o))}
    with _hydra() as loader:
        parsed = [_single(_parse(word, loader)) for word in overrides if not _raw(word)]
        groups = {g: loader.get_group_options(g) for g in loader.list_groups("") if g != "hydra"}
        chosen = [_choice(o, groups[o.key_or_group]) for o in parsed if o.key_or_group in groups and not _none(o)]
        if raw.get("model") in groups["model"]:
            chosen.append(f"model={raw.pop('model')}")
        base = _composed(root, chosen)
        known = _keys(base)
        for key in [*(o.key_or_group for o in parsed if o.key_or_group not in groups), *raw]:
            if key not in known and key != "model":
                raise _unknown(root, key, known, groups, base)
        words = [str(o.input_line) for o in parsed if o.key_or_group not in groups]
        config = _composed(root, chosen + words)
    for key, text in raw.items():
        _place(config, key, text)
    return config


@contextmanager
def _hydra() -> Iterator[Any]:
    with initialize_config_module("conf", job_name="apb", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _raw(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and key in RAW


def _parse(word: str, loader: Any) -> Override:
    try:
        (override,) = OverridesParser.create(loader).parse_overrides([word])
    except HydraException as error:
        key, _, value = word.partition("=")
        raise UserError(
            f"the value of '{key}' cannot be read",
            given=word,
            allowed="numbers, true, false, null, plain words, lists [a,b], and anything in quotes",
            remedy=f"Put the value in quotes, the shell's and Hydra's: \"{key}='{value}'\".",
        ) from error
    if override.type is not OverrideType.CHANGE or override.package is not None:
        raise UserError(
            "settings are changed, never added or removed",
            given=word,
            allowed="key=value",
            remedy=f"Write {override.key_or_group}=VALUE.",
        )
    return override


def _single(override: Override) -> Override:
    if override.is_sweep_override():
        raise UserError(
            f"'{override.key_or_group}' is given several values",
            given=override.input_line,
            allowed="one value, or a sweep with -m",
            remedy="Add -m to run them one after another.",
        )
    return override


def _choice(override: Override, options: Sequence[str]) -> str:
    group = override.key_or_group
    return f"{group}={choose(group, str(override.value()), options)}"


def _none(override: Override) -> bool:
    """Whether a group that is null anyway is set to null, which Hydra itself does not take."""
    return override.value() is None and override.key_or_group in _OPTIONAL_GROUPS


def _composed(root: str, overrides: Iterable[str]) -> dict[str, Any]:
    overrides = list(overrides)
    try:
        config = OmegaConf.to_container(hydra_compose(root, overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"the settings do not fit together: {str(error).splitlines()[0]}",
            given=" ".join(overrides) or root,
            allowed=f"the settings that 'apb {root} --help' shows",
            remedy="Change the setting that is named.",
        ) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every key that can be set, dotted; a group's ``name`` is set by choosing from the group."""
    found: list[str] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _keys(value, f"{prefix}{key}.")
        elif not (prefix and key == "name"):
            found.append(f"{prefix}{key}")
    return found


def _unknown(
    root: str, key: str, known: list[str], groups: Mapping[str, Sequence[str]], base: Mapping[str, Any]
) -> UserError:
    group, _, option = key.partition(".")
    if group in groups and option:
        having = [c for c in groups[group] if key in _keys(_composed(root, [f"{group}={c}"]))]
        name = base.get(group, {}).get("name")
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


def _place(config: dict[str, Any], key: str, text: str) -> None:
    value: str | None = None if text in ("", "null") and key != "model" else text
    group, _, option = key.partition(".")
    if key == "model":
        config["model"] = {"name": text}
    elif key == "decode.stop":
        config[group][option] = texts(key, text)
    elif option:
        config[group][option] = value
    else:
        config[key] = value
