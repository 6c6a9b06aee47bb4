"""Files of draft heads: published checkpoints, our own single files, and the heads that are shipped."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb.draft.base import SINKS, WINDOW, DraftHead, LayerShape, Target
from apb.draft.eagle import EagleHead
from apb.files import tensors as stored
from burst.errors import UserError

FORMAT = "apb-draft-head"
_SHIPPED = Path(__file__).parent
_ALLOWED = "a folder with config.json and model.safetensors or pytorch_model.bin, or a file of 'apb train eagle'"
# What tells the architectures apart: a tensor that no other has.
_ARCHITECTURES = (
    ("midlayer.hidden_norm.weight", "apb.draft.eagle3:Eagle3Head"),
    ("input_norm1.weight", "apb.draft.minicpm:MiniCpmHead"),
    ("fc.weight", "apb.draft.eagle:EagleHead"),
)
_PASSED_OVER = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")  # the target's own, or read apart
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_CONFIG_BYTES = 1_000_000  # published ones have some hundred
_PROBES = 32  # embedded values that tell one base model from another
_TOLERANCE = 0.05  # of their mean size: number types differ by less, base models by more


def shipped() -> dict[str, Path]:
    """Return the heads that come with the package, by the name of their model."""
    return {file.stem: file for file in sorted(_SHIPPED.glob("*.safetensors")) if ".freq" not in file.name}


def find(name: str) -> Path:
    """Return the file or folder that ``name`` means: a shipped head, else a path; raises UserError without one."""
    return stored.find(
        name,
        shipped(),
        Path.exists,
        problem="there is no draft head",
        allowed=_ALLOWED,
        remedy="Check the path, or train one (apb train eagle).",
    )


def ranks(head: Path) -> Path | None:
    """Return the ranked ids that stand beside a shipped head; None where there are none."""
    file = head.with_suffix(".freq.safetensors")
    return file if head.parent == _SHIPPED and file.is_file() else None


def load(name: str | Path, target: Target) -> DraftHead:
    """Return a head ready to draft for ``target``, on its device and in its type, over its whole vocabulary.

    Raises UserError for what cannot be read, lacks or has other tensors than its configuration says, has more than one
    layer, or belongs to a model of another hidden size, vocabulary or embedding.
    """
    path = find(str(name))
    config, tensors, about = _read(path)
    _check_target(path, config, tensors, about, target)
    try:
        kind = next(where for key, where in _ARCHITECTURES if key in tensors)
    except StopIteration:
        raise _damaged(path, "it lacks the tensor fc.weight") from None
    if kind.endswith("Eagle3Head"):
        if "lm_head.weight" not in tensors:
            raise _damaged(path, "it lacks the tensor lm_head.weight")
        if "d2t" not in tensors and len(tensors["lm_head.weight"]) != target.shape.vocab:
            raise _damaged(path, "it lacks the tensor d2t")
    module, _, name_of = kind.partition(":")
    try:
        _check_sizes(path, config, tensors)
        if config["draft_rope"] is not None:
            target = dataclasses.replace(target, rotate=target.rotation(config["draft_rope"]))
        head: DraftHead = getattr(importlib.import_module(module), name_of).of(
            config, tensors, target, config["draft_window"], config["draft_sinks"]
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _damaged(path, f"its configuration lacks or misstates {error}") from error
    if head.head_dim != target.shape.heads.qk_dim:  # its rotations are the target's
        raise _foreign(path, f"head_dim={head.head_dim}", f"head_dim={target.shape.heads.qk_dim}")
    _check_ids(path, head)
    _fill(path, head, tensors)
    head.about = dict(about)
    return head.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)


def save(file: Path, head: EagleHead, about: Mapping[str, str], dtype: torch.dtype = torch.float16) -> None:
    """Write a head as one safetensors file, its configuration as metadata; whole or not at all."""
    tensors = {name: tensor.detach().to(dtype).contiguous().cpu() for name, tensor in head.state_dict().items()}
    config = {**head.config, "draft_window": head.window, "draft_sinks": head.sinks}
    metadata = {
        **about,
        "format": FORMAT,
        "config": json.dumps(config),
        "target_probe": json.dumps([round(x, 6) for x in _probe(head.target.embedding_WE).tolist()]),
    }
    stored.write(file, tensors, metadata)


def configuration(path: Path) -> dict[str, Any]:
    """Return the configuration of the head in ``path``, its window, sinks and RoPE parameters among it.

    Raises UserError for one that cannot be read, or asks for unsupported positions.
    """
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise _damaged(path, "the folder lacks config.json")
        config_file = path / "config.json"
        if config_file.stat().st_size > _CONFIG_BYTES:
            raise _damaged(path, "its config.json is no configuration")
        text: str | None = config_file.read_text(encoding="utf-8", errors="replace")
    else:
        text = stored.metadata(path, _damaged).get("config")
    if text is None:
        raise _damaged(path, "it carries no configuration")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its configuration is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise _damaged(path, "its configuration is no JSON object")
    window = config.get("draft_window", config.get("sliding_window") or WINDOW)
    sinks = config.get("draft_sinks", SINKS)
    if (window is not None and (type(window) is not int or window < 1)) or type(sinks) is not int or sinks < 0:
        raise _damaged(path, f"its configuration names a window of {window} and {sinks} sinks")
    try:
        rope = _rope(config)
    except (TypeError, ValueError) as error:
        raise _damaged(path, f"its configuration names {error}") from error
    if rope is not None and rope["rope_type"] not in _ROPE_TYPES:
        raise UserError(
            f"the positions of the draft head {path} cannot be used",
            given=f"rope_type={rope['rope_type']}",
            allowed=", ".join(_ROPE_TYPES),
            remedy="Choose another head, or train one (apb train eagle model=...).",
        )
    return config | {"draft_window": window, "draft_sinks": sinks, "draft_rope": rope}


def _rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the RoPE parameters that a configuration names; None: the target's.

    Published heads were trained with their own. Raises TypeError or ValueError for unsupported values.
    """
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise TypeError(f"{key}={found!r}, which is no JSON object")
    theta = found.get("rope_theta", config.get("rope_theta"))
    if theta is None and not found:
        return None
    if theta is not None and (not isinstance(theta, int | float) or theta <= 0):
        raise ValueError(f"rope_theta={theta!r}, which is no number above 0")
    kind = found.get("rope_type", found.get("type", None if set(found) - {"rope_theta"} else "default"))
    if kind is None:
        raise ValueError(f"{key} without a rope_type")
    return found | {"rope_type": kind} | ({} if theta is None else {"rope_theta": float(theta)})


def footprint(path: Path) -> tuple[int, int]:
    """Return how many weights the head in ``path`` has of its own, and how many numbers it reads of a token.

    Only the tensors' shapes are read; raises UserError for files that are no heads.
    """
    shapes = {name.removeprefix("model."): shape for name, shape in stored.shapes(weights_file(path), _damaged).items()}
    if len(shapes.get("fc.weight", ())) != 2:
        raise _damaged(path, "it lacks the tensor fc.weight")
    hidden, read = shapes["fc.weight"]
    own_output = _ARCHITECTURES[0][0] in shapes  # EAGLE-3: its own LM head, and the embedding is not fused
    foreign = [name for name in _PASSED_OVER if not (own_output and name == "lm_head.weight")]
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name not in foreign)
    return weights, read if own_output else read - hidden


def weights_file(path: Path) -> Path:
    """Return the file with the tensors; raises UserError for a folder without one."""
    if not path.is_dir():
        return path
    found = [path / n for n in ("model.safetensors", "pytorch_model.bin") if (path / n).is_file()]
    if not found:
        raise _damaged(path, "the folder lacks its weights")
    return found[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return configuration, tensors by their plain names, and metadata."""
    config, weights = configuration(path), weights_file(path)
    tensors = {name.removeprefix("model."): tensor for name, tensor in stored.read(weights, _damaged).items()}
    return config, tensors, stored.metadata(weights, _damaged)


def _check_target(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, str], target: Target
) -> None:
    shape = target.shape
    if config.get("num_hidden_layers", 1) != 1:
        raise _damaged(path, f"it has {config['num_hidden_layers']} layers; heads of one layer can be used")
    wanted: dict[str, Any] = {"hidden_size": shape.hidden, "vocab_size": shape.vocab}
    found = {key: config.get(key) for key in wanted}
    scales = {"scale_emb": target.embedding_scale, "dim_model_base": target.logit_scale * shape.hidden}
    wanted |= {key: round(value, 6) for key, value in scales.items() if key in config}
    found |= {key: config[key] for key in scales if key in config}
    if found != wanted:
        raise _foreign(path, _listed(found), _listed(wanted))
    theirs = tensors.get("embed_tokens.weight")
    if theirs is not None and theirs.shape != target.embedding_WE.shape:
        raise _foreign(path, f"embeddings {tuple(theirs.shape)}", f"embeddings {tuple(target.embedding_WE.shape)}")
    probe = _stored_probe(path, about["target_probe"]) if "target_probe" in about else None
    if theirs is not None:
        probe = _probe(theirs)
    own = _probe(target.embedding_WE)
    if probe is not None and (probe - own).abs().mean() > _TOLERANCE * own.abs().mean():
        raise _foreign(path, "other token embeddings", f"the embeddings of this {target.name}")


def _check_sizes(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Reject a layer that the file's numbers cannot fill: it is allocated before it is filled."""
    layer = LayerShape.of(config)
    widest = max(layer.intermediate_size, layer.num_attention_heads * layer.head_dim)
    if widest * layer.hidden_size > sum(tensor.numel() for tensor in tensors.values()):
        raise _damaged(path, f"its configuration names a width of {widest}, for which it has too few numbers")


def _check_ids(path: Path, head: DraftHead) -> None:
    ids_V, vocab = head.ids_V, head.target.shape.vocab
    if int(ids_V.min()) < 0 or int(ids_V.max()) >= vocab or len(ids_V.unique()) != len(ids_V):
        raise _damaged(path, f"its d2t maps to ids out of range or twice to one (vocabulary of {vocab})")


def _fill(path: Path, head: DraftHead, tensors: Mapping[str, Tensor]) -> None:
    own = head.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise _damaged(path, f"it lacks the tensor {name}")
        if tensors[name].shape != tensor.shape:
            sizes = f"{tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
            raise _damaged(path, f"its tensor {name} is {sizes}")
    unknown = [n for n in tensors if n not in own and n not in _PASSED_OVER and "rotary_emb" not in n]
    if unknown:
        raise _damaged(path, f"it has the tensor {unknown[0]}, which no known head has")
    head.load_state_dict({name: tensors[name] for name in own})


def _stored_probe(path: Path, text: str) -> Tensor:
    try:
        probe = torch.tensor(json.loads(text), dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise _damaged(path, f"its target_probe is none ({error})") from error
    if probe.shape != (_PROBES,):
        raise _damaged(path, f"its target_probe has {tuple(probe.shape)} values")
    return probe


def _probe(embedding_WE: Tensor) -> Tensor:
    """Return a few values from all over an embedding, fp32."""
    rows = torch.linspace(0, embedding_WE.shape[0] - 1, _PROBES).long().to(embedding_WE.device)
    columns = torch.arange(_PROBES, device=embedding_WE.device) * 7 % embedding_WE.shape[1]
    return embedding_WE[rows, columns].detach().float().cpu()


def _listed(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sizes.items())


def _foreign(path: Path, given: str, allowed: str) -> UserError:
    return UserError(
        f"the draft head {path} belongs to another model",
        given=given,
        allowed=allowed,
        remedy="Choose the model's own head, or train one (apb train eagle model=...).",
    )


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"the draft head {path} cannot be used: {what}",
        given=str(path),
        allowed=_ALLOWED,
        remedy="Copy it again, or choose another head.",
    )
