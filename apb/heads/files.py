"""Files of retaining heads: the published torch state dicts, our safetensors, and the ones that are shipped."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apb.heads.base import Head, Keys, RetainingHeads
from burst.errors import UserError

FORMAT = "apb-retaining-heads"
PUBLISHED_WINDOW = 5  # of the max-pool that follows the published heads; Locret (arXiv 2410.01805), section 3.1
_KEY = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:.*\.)?(fc1|fc2)\.(?:.*\.)?(weight|bias)")
_SHIPPED = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Return the files that come with the package, by the name of their model."""
    return {file.stem: file for file in sorted(_SHIPPED.glob("*.safetensors"))}


def find(name: str) -> Path:
    """Return the file that ``name`` means: shipped heads, else a path; raises UserError when there is none."""
    known = shipped()
    if name in known:
        return known[name]
    file = Path(name).expanduser()
    if file.is_file():
        return file
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise UserError(
        f"there are no retaining heads '{name}'",
        given=name,
        allowed=f"{', '.join(known) or 'no shipped heads'}, or a file (.safetensors, or a torch state dict)",
        remedy=f"Did you mean {' or '.join(near)}?" if near else "Check the path, or train heads for the model.",
    )


def load(file: Path) -> RetainingHeads:
    """Return the heads in a file, on the CPU in the type they are stored in; read once while the file is unchanged.

    Hidden width, layers and kv heads are the tensors' own. Keys that are no head's are passed over, as published
    checkpoints have them. Raises UserError for a file that cannot be read or lacks a part.
    """
    now = file.stat()
    return _load(file, (now.st_mtime_ns, now.st_ino, now.st_size))


@functools.lru_cache(maxsize=4)
def _load(file: Path, version: tuple[int, ...]) -> RetainingHeads:
    tensors, about = _read(file)
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := _KEY.fullmatch(key):
            parts.setdefault(int(found[1]), {})[f"{found[2]}.{found[3]}"] = tensor
    if not parts:
        raise _damaged(file, "it holds no tensors named model.layers.I.self_attn.fc1 and fc2")
    linear = about.get("method") == "ridge"
    heads = []
    for layer in range(max(parts) + 1):
        mine = parts.get(layer, {})
        for name in ("fc1.weight",) if linear else ("fc1.weight", "fc2.weight"):
            if name not in mine:
                raise _damaged(file, f"layer {layer} lacks {name}")
        heads.append(Head(mine["fc1.weight"], mine.get("fc1.bias"), mine.get("fc2.weight")))
    shapes = {(h.fc1_WE.shape, None if h.fc2_KW is None else h.fc2_KW.shape) for h in heads}
    if len(shapes) > 1 or any(h.fc2_KW is not None and h.fc2_KW.shape[1] != h.hidden for h in heads):
        raise _damaged(file, "its layers do not fit together")
    keys: Keys = "from_end" if about.get("keys") == "from_end" else "raw"
    return RetainingHeads(tuple(heads), int(about.get("window", PUBLISHED_WINDOW)), keys, about)


@functools.lru_cache(maxsize=4)
def on_device(heads: RetainingHeads, device: torch.device, dtype: torch.dtype) -> tuple[Head, ...]:
    """Return every layer's head on a device, in a type; virtual hosts of one process share them."""
    return tuple(head.to(device).to(dtype) for head in heads.layers)


def save(file: Path, heads: RetainingHeads, dtype: torch.dtype = torch.float16) -> None:
    """Write heads as safetensors in ``dtype``, ``about`` and window as metadata; whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for layer, head in enumerate(heads.layers):
        parts = {"fc1.weight": head.fc1_WE, "fc1.bias": head.bias_W, "fc2.weight": head.fc2_KW}
        for name, tensor in parts.items():
            if tensor is not None:
                tensors[f"model.layers.{layer}.self_attn.{name}"] = tensor.to(dtype).contiguous().cpu()
    unfinished = file.with_suffix(".part")
    metadata = {**heads.about, "format": FORMAT, "window": str(heads.window), "keys": heads.keys}
    save_file(tensors, unfinished, metadata=metadata)
    unfinished.chmod(0o644)
    os.replace(unfinished, file)


def _read(file: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                metadata: dict[str, str] = opened.metadata() or {}
                names: list[str] = opened.keys()
                return {name: opened.get_tensor(name) for name in names}, metadata
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise _damaged(file, f"it cannot be read ({error})") from error
    except Exception as error:  # unpickling refuses in many ways, some by private types
        raise _damaged(file, f"it is no plain state dict ({type(error).__name__})") from error
    if not isinstance(state, Mapping):
        raise _damaged(file, "it is no state dict")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}, {}


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"the retaining heads {file} cannot be used: {what}",
        given=str(file),
        allowed="safetensors of 'apb train retaining_heads', or a published torch state dict",
        remedy="Copy the file again, or choose another compress.heads.",
    )
