"""Checks of a model folder's JSON values before transformers acts on them: foreign code, and sizes that never end.

transformers builds lists and modules by what config.json says, and may run code that a folder names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apb.models.files import check_texts, damaged, read_json
from apb.models.towers import TOWERS
from burst.errors import UserError

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
# Files of a text model in which nothing that we load can need code; transformers may read some of them.
_OTHERS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
# What is repeated as modules or list entries: published decoders have up to 320 layers, 512 experts.
_COUNTED = re.compile(r"layers?$|expert|label|depth|num_.*(block|head)|n_head")
_MOST_COUNTED, _MOST = 1024, 1 << 40
_DEPTH, _ENTRIES = 32, 200_000  # of nested values, and of all values together


def check_code(folder: Path) -> None:
    """Reject a folder whose texts cannot be read, or that needs code of its own; raises UserError.

    A folder that names code beside a kind that transformers has, as many published ones do, is read by transformers'
    own classes. The folder's code is never run.
    """
    check_texts(folder)
    config = read_json(folder / CONFIG)
    check_values(folder / CONFIG, config)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            "the model folder holds an adapter, which is not merged into its weights",
            given=str(folder / "adapter_config.json"),
            allowed="a folder with whole weights",
            remedy="Merge it (merge_and_unload of peft) and save the result, or move adapter_config.json away.",
        )
    for name in (TOKENIZER_CONFIG, *_OTHERS):
        if not (folder / name).exists():
            continue
        values = read_json(folder / name)
        if "auto_map" not in values or values["auto_map"] is None:
            continue
        own = values.get("tokenizer_class")
        if name != TOKENIZER_CONFIG or not isinstance(own, str) or not _known(own):
            raise needs_code(folder / name, values["auto_map"])


def check_values(source: Path | None, config: Mapping[str, Any]) -> None:
    """Reject a configuration that needs code of its own, or whose sizes would not end; raises UserError.

    ``source``: the file with the configuration, None for one that was given as values.
    """
    auto_map = config.get("auto_map")
    if auto_map is not None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        kind, classes = config.get("model_type"), config.get("architectures")
        known = [_known(name) for name in classes] if isinstance(classes, list) else []
        decoder = isinstance(kind, str) and (kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in TOWERS)
        if not decoder or not all(known):
            raise needs_code(source, auto_map)
    for place, key, value in _walk(source, config):
        most = _MOST_COUNTED if _COUNTED.search(key.lower()) else _MOST
        if isinstance(value, int) and abs(value) > most:
            raise _wrong(source, f"{place} is {value}", f"at most {most}")


def needs_code(source: Path | None, auto_map: object) -> UserError:
    """Return the error for a folder whose kind exists only as code of its own."""
    name = source.name if source is not None else "model.config"
    return UserError(
        f"the model needs code of its own (auto_map in {name}), which apb does not run",
        given=f"auto_map={str(auto_map)[:200]}",
        allowed="kinds of models, tokenizers and processors that the installed transformers has",
        remedy="Choose a model that transformers has, a conversion of this one, or update transformers.",
    )


def _known(name: object) -> bool:
    """Return True where transformers has a class of this name."""
    import transformers

    try:
        return isinstance(name, str) and name.isidentifier() and isinstance(getattr(transformers, name, None), type)
    except (ImportError, RuntimeError):  # it is there, but what it needs is not
        return False


def _walk(source: Path | None, values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield all values with their place and the nearest key; raises UserError for what is nested too deeply."""
    stack: list[tuple[str, str, Any, int]] = [("", "", values, 0)]
    count = 0
    while stack:
        place, key, value, depth = stack.pop()
        count += 1
        if depth > _DEPTH or count > _ENTRIES:
            raise _wrong(source, "values are nested too deeply, or too many", f"{_DEPTH} levels, {_ENTRIES} values")
        if isinstance(value, Mapping):
            stack += [(f"{place}.{k}" if place else str(k), str(k), v, depth + 1) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(f"{place}[{i}]", key, v, depth + 1) for i, v in enumerate(value)]
        else:
            yield place, key, value


def _wrong(source: Path | None, what: str, allowed: str) -> UserError:
    if source is not None:
        return damaged(source, f"{what}; allowed: {allowed}")
    return UserError(
        f"the model configuration cannot be used: {what}", given=what, allowed=allowed, remedy="Change model.config."
    )
