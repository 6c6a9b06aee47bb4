"""Quantised checkpoints that transformers dequantises while it loads: MXFP4 experts, and fp8 with scales by block.

What is loaded are plain weights in the asked type, so memory is that of the parameters, not that of the files. Every
packed tensor is checked against its scales before: transformers leaves one without scales as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apb.files.tables import Shapes
from apb.models.files import damaged
from apb.models.weights import check_types, weights_file
from burst.errors import UserError

_BLOCKS, _SCALES = "_blocks", "_scales"  # of MXFP4: two numbers of 4 bits a byte, one exponent for 32 numbers
_SCALE = "_scale_inv"  # of fp8
_BLOCK = (128, 128)  # rows and columns with one scale where a configuration does not say
_FP8 = ("F8_E4M3", "F8_E5M2")
_PACKED = ("U8", "I8", *_FP8)


def quantisation(config: Any) -> dict[str, Any]:
    """Return what a configuration says of its weights' quantisation; empty where they are plain."""
    for name in ("quantization_config", "compression_config"):
        found = getattr(config, name, None)
        if found:
            return {"quant_method": "?", **(found if isinstance(found, Mapping) else found.to_dict()), "said": name}
    return {}


def check_quantisation(config: Any) -> None:
    """Reject quantisations that are not dequantised at load; raises UserError."""
    said = quantisation(config)
    if not said:
        return
    method = _method(said)
    known = {
        "mxfp4": getattr(config, "model_type", None) == "gpt_oss",
        "fp8": said.get("expert_dtype", "fp8") == "fp8",
    }
    if not known.get(method, False):
        raise UserError(
            f"the model's weights are quantised ({said['said']} in config.json) in a way that apb does not dequantise",
            given=f"{said['said']}: {method}",
            allowed="weights in float32, bfloat16, float16 or float64, gpt-oss in mxfp4, fp8 with scales by block",
            remedy="Choose the model's unquantised checkpoint, or dequantise this one and save it.",
        )


def dequantising(config: Any) -> Any:
    """Return a configuration of which transformers dequantises the weights that it loads."""
    if not quantisation(config):
        return config
    out = copy.deepcopy(config)
    given = out.quantization_config
    out.quantization_config = {**(given if isinstance(given, Mapping) else given.to_dict()), "dequantize": True}
    return out


def unpacked(folder: Path, found: Shapes, config: Any) -> Shapes:
    """Return the shapes of a checkpoint's tensors once they are dequantised, without their scales.

    ``found``: those in the files. Raises UserError naming a packed tensor whose scales are missing or do not fit it.
    """
    said = quantisation(config)
    if not said:
        return found
    file, types, block = weights_file(folder), check_types(folder), said.get("weight_block_size", _BLOCK)
    if block is not None and not _is_block(block):
        raise damaged(folder / "config.json", f"its weight_block_size is {str(block)[:100]}, where two sizes stand")
    out: Shapes = {}
    scales = (_SCALES,) if _method(said) == "mxfp4" else (_SCALE, ".activation_scale")
    for name, shape in found.items():
        stem = name.removesuffix(_BLOCKS)
        if name.endswith(scales):
            continue
        if stem != name:
            if len(shape) != 4 or types[name] != "U8" or found.get(stem + _SCALES) != shape[:3]:
                raise damaged(file, f"{name} has no {_SCALES} that fit it")
            experts, rows, groups, width = shape
            out[stem] = (experts, groups * width * 2, rows)
        elif types[name] in _PACKED:
            _check_scales(file, name, types[name], shape, found.get(name + _SCALE), block)
            out[name] = shape
        else:
            out[name] = shape
    return out


def _is_block(block: Any) -> bool:
    return isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)


def _method(said: Mapping[str, Any]) -> str:
    return str(getattr(said["quant_method"], "value", said["quant_method"]))


def _check_scales(
    file: Path, name: str, kind: str, shape: tuple[int, ...], scales: tuple[int, ...] | None, block: Any
) -> None:
    """Reject an fp8 weight whose scales transformers would miss, or lay over other rows and columns than theirs."""
    if scales is None or kind not in _FP8:
        raise damaged(file, f"{name} is packed as {kind} and has no {name}{_SCALE}")
    fits = len(scales) <= 2 and all(n == 1 for n in scales)
    if block is not None and not fits:
        fits = tuple(scales) == tuple(n / size for n, size in zip(shape[-2:], block, strict=True))
    if not fits:
        raise UserError(
            f"the installed transformers cannot dequantise {name} of {file}",
            given=f"a weight of {shape} with scales of {scales}, by blocks of {block}",
            allowed="weights that are whole blocks of weight_block_size, or have one scale",
            remedy="Choose the model's unquantised checkpoint, or dequantise this one and save it.",
        )
