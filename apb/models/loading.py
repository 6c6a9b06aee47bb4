"""Configuration, tokenizer and weights from a local folder; every damaged file is refused by its name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apb.models.files import INDEX, WEIGHTS, check_weights, damaged, quiet, read_json
from apb.models.placement import resolve_device, resolve_dtype, torch_dtype
from apb.models.raw import check_code, check_values
from burst.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_logger = logging.getLogger(__name__)


def load_config(path: Path) -> PretrainedConfig:
    """Return the folder's configuration; raises UserError when it is damaged or of an unknown kind."""
    file = path / "config.json"
    check_code(path)
    with quiet():
        from transformers import AutoConfig

        try:
            return _plain(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False))
        # Validation raises many kinds, some private to huggingface_hub; all of them mean this one file.
        except Exception as error:
            raise UserError(
                f"the model configuration {file} cannot be used: {_first_line(error)}",
                given=str(file),
                allowed="the configuration of a decoder that the installed transformers knows",
                remedy="Choose another model, copy its config.json again, or update transformers.",
            ) from error


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer; raises UserError when its files are missing or damaged."""
    check_code(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (path / name).exists():
            read_json(path / name)
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        raise UserError(
            f"the model folder {path} holds no tokenizer",
            given=str(path),
            allowed=f"one of {', '.join(_TOKENIZER_FILES)}",
            remedy="Copy the tokenizer's files into the folder.",
        )
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise UserError(
                f"the tokenizer in {path} cannot be loaded: {_first_line(error)}",
                given=str(path),
                allowed="a tokenizer that the installed transformers can load",
                remedy="Copy the tokenizer's files again, or install what the message asks for.",
            ) from error


def load_model(path: Path, *, dtype: str, device: str) -> PreTrainedModel:
    """Return the folder's model in evaluation mode, without gradients, on one device.

    ``dtype`` and ``device`` are the names that ``apb.models.placement`` knows. Raises UserError for unknown
    names, absent devices, and weights that are damaged or do not fit config.json: transformers would fill in
    random numbers for what is missing.
    """
    device = resolve_device(device)
    config = load_config(path)
    dtype = resolve_dtype(dtype, device, config)
    if (path / "generation_config.json").exists():
        read_json(path / "generation_config.json")  # transformers ignores a damaged one, and with it the stop tokens
    check_weights(path)
    # On a device, weights go there tensor by tensor; on the CPU without a device map they stay memory-mapped.
    placement = {} if device == "cpu" else {"device_map": {"": device}}
    with quiet():
        from transformers import AutoModelForCausalLM

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=torch_dtype(dtype),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are named below
                **placement,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise damaged(_weights_file(path), f"it cannot be loaded ({_first_line(error)})") from error
    _check_loaded(path, info)
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


def make_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration with these values, as in a config.json; raises UserError when it is of no known kind."""
    check_values(None, values)
    with quiet():
        from transformers import AutoConfig

        try:
            return _plain(AutoConfig.for_model(**values))
        except Exception as error:  # as in load_config
            raise UserError(
                f"the model configuration cannot be used: {_first_line(error)}",
                given=f"model_type {values.get('model_type')}",
                allowed="the values of a config.json of a decoder that the installed transformers knows",
                remedy="Change model.config.",
            ) from error


def random_model(values: Mapping[str, Any], *, dtype: str, device: str) -> PreTrainedModel:
    """Return a model of this configuration with random weights, the same ones every time, made on the device.

    For times and bytes only: what depends on what is attended to means nothing.
    """
    config = make_config(values)
    with quiet(), torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch_dtype(dtype), trust_remote_code=False
            )
    model.eval()
    model.requires_grad_(False)
    return model


def generation_stop_ids(source: Path | PreTrainedModel) -> tuple[int, ...]:
    """Return the token ids that end an answer: the generation configuration's, then the model's own.

    ``source`` is a model folder (nothing is imported or loaded for it) or a loaded model.
    """
    if isinstance(source, Path):
        generation = source / "generation_config.json"
        declared = [read_json(generation).get("eos_token_id")] if generation.exists() else []
        config = read_json(source / "config.json")
        nested = config.get("text_config") or {}
        declared += [config.get("eos_token_id"), nested.get("eos_token_id")]
    else:
        configs = (source.generation_config, source.config, source.config.get_text_config())
        declared = [getattr(config, "eos_token_id", None) for config in configs]
    found: list[int] = []
    for ids in declared:
        found += [ids] if isinstance(ids, int) else (ids or [])
    return tuple(dict.fromkeys(found))


def _check_loaded(path: Path, info: dict[str, Any]) -> None:
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    for what, names in (("lacks", info["missing_keys"]), ("has another shape for", mismatched)):
        if names:
            first = sorted(names)[0]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise damaged(_weights_file(path), f"against config.json it {what} the tensor {first}{more}")
    if info["unexpected_keys"]:
        names = sorted(info["unexpected_keys"])
        _logger.warning("%s has %d tensors that the model does not use, such as %s", path, len(names), names[0])


def _weights_file(path: Path) -> Path:
    return next((path / name for name in (WEIGHTS, INDEX) if (path / name).exists()), path / "pytorch_model.bin")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
