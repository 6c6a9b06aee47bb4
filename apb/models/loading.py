"""Configuration, tokenizer and weights from a local folder; every damaged file is refused by its name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apb.models.files import damaged, first_line, quiet, read_json, reading
from apb.models.placement import resolve_device, resolve_dtype, torch_dtype
from apb.models.quantised import check_quantisation, dequantising, unpacked
from apb.models.raw import check_code, check_values
from apb.models.tokens import as_in_file
from apb.models.towers import TOWERS, Tower, find_tower, is_tower, text_config
from apb.models.weights import check_fit, check_weights, held, not_fitting, readable, weights_file
from burst.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_logger = logging.getLogger(__name__)


def load_config(path: Path) -> PretrainedConfig:
    """Return the folder's configuration, of a composite that of its text tower.

    Raises UserError when it is damaged or of an unknown kind.
    """
    file = path / "config.json"
    check_code(path)
    with quiet(), reading(file, "the configuration of a decoder that the installed transformers knows"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if is_tower(config):
            config = text_config(config, read_json(file), held(path))
        config = _plain(config)
        config._name_or_path = str(path)
        return config


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer; raises UserError when its files are missing or damaged."""
    check_code(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists():
            read_json(path / name)
    files = [path / name for name in _TOKENIZER_FILES if (path / name).exists()]
    if not files:
        raise UserError(
            f"the model folder {path} holds no tokenizer",
            given=str(path),
            allowed=f"one of {', '.join(_TOKENIZER_FILES)}",
            remedy="Copy the tokenizer's files into the folder.",
        )
    with quiet(), reading(files[0], "a tokenizer that the installed transformers can load"):
        from transformers import AutoTokenizer

        return as_in_file(path, AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))


def load_model(path: Path, *, dtype: str, device: str, yarn: int | None = None) -> PreTrainedModel:
    """Return the folder's model in evaluation mode, without gradients, on one device.

    ``dtype`` and ``device`` are the names that ``apb.models.placement`` knows, ``yarn`` the factor that RoPE is
    stretched by. Raises UserError for unknown names, absent devices, and weights that are damaged or do not fit
    config.json: transformers would fill in random numbers for what is missing.
    """
    device = resolve_device(device)
    config = load_config(path)
    check_quantisation(config)
    dtype = resolve_dtype(dtype, device, config)
    from apb.models.shape import parameter_shapes
    from apb.models.yarn import with_yarn

    config = with_yarn(config, yarn)
    generation_stop_ids(path)  # transformers ignores a damaged file, and with it the stop tokens
    found, wanted, tower = unpacked(path, check_weights(path), config), parameter_shapes(config), None
    if read_json(path / "config.json").get("model_type") in TOWERS:
        tower = find_tower(found, wanted, str(weights_file(path)))
        found = tower.shapes(found)
    check_fit(path, found, wanted)
    # On a device, weights go there tensor by tensor; on the CPU without a device map they stay memory-mapped.
    placement = {} if device == "cpu" else {"device_map": {"": device}}
    allowed = "weights that the installed transformers can load into the model of config.json"
    with quiet(), readable(path) as folder, reading(weights_file(path), allowed):
        from apb.models.classes import causal_lm

        model, info = causal_lm().from_pretrained(
            folder,
            config=dequantising(config),
            dtype=torch_dtype(dtype),
            experts_implementation=_experts(dtype),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below
            key_mapping=None if tower is None else tower.key_mapping,
            **placement,
        )
    _check_loaded(path, info, tower)
    model.eval()
    model.requires_grad_(False)
    loaded: PreTrainedModel = model
    return loaded


def _plain(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration without what it says of code: our attention and plain experts take their places.

    One that names flash attention would need its package, one that names a kernel of the hub would fetch it.
    """
    config._attn_implementation = "eager"
    config._experts_implementation = None
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


def _experts(dtype: str) -> str | None:
    """Return which of transformers' computations of experts is taken: its default knows no float64."""
    return "eager" if dtype == "float64" else None


def make_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration with these values, as in a config.json; raises UserError when it is of no known kind."""
    check_values(None, values)
    with quiet():
        from transformers import AutoConfig

        try:
            config = AutoConfig.for_model(**values)
            return _plain(text_config(config, values, None) if is_tower(config) else config)
        except Exception as error:  # as in ``reading``
            raise UserError(
                f"the model configuration cannot be used: {first_line(error)}",
                given=f"model_type {values.get('model_type')}",
                allowed="the values of a config.json of a decoder that the installed transformers knows",
                remedy="Change model.config.",
            ) from error


def random_model(values: Mapping[str, Any], *, dtype: str, device: str, yarn: int | None = None) -> PreTrainedModel:
    """Return a model of this configuration with random weights, the same ones every time, made on the device.

    For times and bytes only: what depends on what is attended to means nothing.
    """
    from apb.models.yarn import with_yarn

    config = with_yarn(make_config(values), yarn)
    with quiet(), torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        from apb.models.classes import causal_lm

        torch.manual_seed(0)
        with torch.device(device):
            model: PreTrainedModel = causal_lm().from_config(
                config,
                dtype=torch_dtype(dtype),
                experts_implementation=_experts(dtype),
                trust_remote_code=False,
            )
    model.eval()
    model.requires_grad_(False)
    return model


def generation_stop_ids(source: Path | PreTrainedModel) -> tuple[int, ...]:
    """Return the token ids that end an answer: the generation configuration's, then the model's own.

    ``source`` is a model folder (nothing is imported or loaded for it) or a loaded model. Raises UserError naming the
    file with what is no id; negative numbers, which some files have for none, are left out.
    """
    declared: list[tuple[Path | None, Any]] = []
    if isinstance(source, Path):
        generation = source / "generation_config.json"
        if generation.exists():
            declared.append((generation, read_json(generation).get("eos_token_id")))
        config = read_json(source / "config.json")
        nested = config.get("text_config")
        declared.append((source / "config.json", config.get("eos_token_id")))
        if isinstance(nested, dict):
            declared.append((source / "config.json", nested.get("eos_token_id")))
    else:
        configs = (source.generation_config, source.config, source.config.get_text_config())
        declared = [(None, getattr(config, "eos_token_id", None)) for config in configs]
    found: list[int] = []
    for file, given in declared:
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if file is not None and not all(type(i) is int for i in ids):
            raise damaged(file, f"its eos_token_id is {str(given)[:100]}, where whole numbers stand")
        found += [i for i in ids if i >= 0]
    return tuple(dict.fromkeys(found))


def _check_loaded(path: Path, info: dict[str, Any], tower: Tower | None) -> None:
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    missing = sorted(info["missing_keys"])
    if missing or mismatched:
        raise not_fitting(path, missing, sorted(mismatched))
    if tower is not None:
        _logger.debug("%s has %d tensors outside its text tower, which are left out", path, tower.outside)
    unused = [name for name in info["unexpected_keys"] if tower is None or name in tower.names.values()]
    if unused:
        _logger.warning("%s has %d tensors that the model does not use, such as %s", path, len(unused), min(unused))
