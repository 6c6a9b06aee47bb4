"""Files of retaining heads: the published torch state dicts, our safetensors, and the ones that are shipped."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

from apb.compress.heads.base import Head, Keys, RetainingHeads
from apb.files import tensors as stored
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
    return stored.find(
        name,
        shipped(),
        Path.is_file,
        problem="there are no retaining heads",
        allowed="a file (.safetensors, or a torch state dict)",
        remedy="Check the path, or train heads for the model.",
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
    tensors, about = stored.read(file, _damaged), stored.metadata(file, _damaged)
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
    stored.write(file, tensors, {**heads.about, "format": FORMAT, "window": str(heads.window), "keys": heads.keys})


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"the retaining heads {file} cannot be used: {what}",
        given=str(file),
        allowed="safetensors of 'apb train retaining_heads', or a published torch state dict",
        remedy="Copy the file again, or choose another compress.heads.",
    )
