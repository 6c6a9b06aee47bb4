"""Tables of tensors: which names and shapes a file says it holds, checked against its size, the numbers unread."""

from __future__ import annotations

import json
import math
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burst.errors import UserError

Damaged = Callable[[Path, str], UserError]  # the error that says what is wrong with a file
Shapes = dict[str, tuple[int, ...]]

_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors format's own bound on its header
_PICKLE_LIMIT_BYTES = 100_000_000  # names and shapes of a hundred thousand tensors have some 20 million
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
_BYTES |= {
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


def safetensors_table(file: Path, damaged: Damaged) -> Shapes:
    """Return the shapes in a safetensors file's header, in milliseconds.

    Raises ``damaged``'s error where header and file disagree, as they do after an interrupted copy.
    """
    return {name: shape for name, (shape, _) in safetensors_entries(file, damaged).items()}


def safetensors_entries(file: Path, damaged: Damaged) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shapes and types in a safetensors file's header; raises as ``safetensors_table``."""
    size = _regular(file, damaged)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
                raise damaged(file, f"{size} bytes are too few for its header")
            header = json.loads(stream.read(length))
        entries = [(name, *_entry(value)) for name, value in header.items() if name != "__metadata__"]
        types = {name: str(header[name]["dtype"]) for name, *_ in entries}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(file, "its header cannot be read") from error
    about = header.get("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise damaged(file, "its header's __metadata__ holds more than texts")
    expected = 8 + length + max((stop for _, _, _, stop in entries), default=0)
    if size != expected:
        raise damaged(file, f"it has {size} bytes where its header says {expected}")
    end = 0
    for name, _, start, stop in sorted(entries, key=lambda entry: entry[2:]):
        if start != end:
            raise damaged(file, f"the tensor {name} does not begin where the one before ends")
        end = stop
    return {name: (shape, types[name]) for name, shape, _, _ in entries}


def _entry(value: Any) -> tuple[tuple[int, ...], int, int]:
    """Return a tensor's shape, start and stop; raises ValueError, KeyError or TypeError for what is none."""
    shape, (start, stop) = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(value)
    if stop - start != math.prod(shape) * _BYTES[value["dtype"]]:
        raise ValueError(value)
    return tuple(shape), start, stop


def pickle_table(file: Path, damaged: Damaged) -> Shapes:
    """Return the shapes in a state dict that ``torch.save`` wrote; raises ``damaged``'s error."""
    return {name: tuple(tensor.shape) for name, tensor in pickle_tensors(file, damaged, "meta").items()}


def pickle_tensors(file: Path, damaged: Damaged, device: str) -> Mapping[str, Tensor]:
    """Return a state dict's tensors on a device; nothing but tensors is unpickled. Raises ``damaged``'s error."""
    size = _regular(file, damaged)
    try:
        # Checked first: what is packed or pickled may say that it is far larger than the file.
        with zipfile.ZipFile(file) as archive:
            inside = archive.infolist()
        if any(each.compress_type != zipfile.ZIP_STORED for each in inside) or sum(e.file_size for e in inside) > size:
            raise damaged(file, "it is packed otherwise than torch packs")
        if any(e.file_size > _PICKLE_LIMIT_BYTES for e in inside if e.filename.endswith(".pkl")):
            raise damaged(file, "its table of tensors is too large")
        state = torch.load(file, map_location=device, weights_only=True)
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise damaged(file, "it is no file of torch.save (or one of before torch 1.6)") from error
    except Exception as error:  # unpickling refuses in many ways, some by private types
        raise damaged(file, f"it is no plain state dict ({type(error).__name__})") from error
    if not isinstance(state, Mapping):
        raise damaged(file, "it is no state dict")
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _regular(file: Path, damaged: Damaged) -> int:
    """Return the size of a regular file; raises ``damaged``'s error for a pipe, a folder, or nothing."""
    try:
        about = file.stat()
    except FileNotFoundError as error:
        raise damaged(file, "it is missing") from error
    except OSError as error:
        raise damaged(file, f"it cannot be read ({error})") from error
    if not stat.S_ISREG(about.st_mode):
        raise damaged(file, "it is no regular file")
    return about.st_size
