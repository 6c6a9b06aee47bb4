"""Model, device and folder of a training."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apb.models.fetch.embedded import default_cache_dir
from burst.errors import UserError
from launch.terminal.display import Display

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from apb.models.adapter import Adapter


@dataclass(frozen=True)
class Place:
    """Where the model is, what it runs on and in which type, and the cache folder."""

    path: Path
    device: str
    dtype: str
    cache: Path

    def folder(self, name: str, job: DataclassInstance, out: str | None) -> Path:
        """Return the job's working folder: ``out``, or one in the cache that the same settings find again."""
        short = hashlib.sha256(json.dumps(asdict(job), sort_keys=True).encode()).hexdigest()[:12]
        return Path(out) if out else self.cache / "train" / f"{name}-{short}"

    def load(self, dtype: str, threads: int, display: Display) -> Adapter:
        """Load the model in a type."""
        from apb.host.load import load_adapter
        from apb.host.messages import HostSpec

        if self.device == "cpu":
            torch.set_num_threads(threads)
        with display.waiting("Loading the model"):
            return load_adapter(HostSpec(str(self.path), dtype, self.device))


def place(model: str, device: str, dtype: str, display: Display) -> Place:
    """Find the model and settle device and type; raises UserError where these are missing or unsupported."""
    from apb.layers.full import Full
    from apb.models.checks import check_config
    from apb.models.fetch.resolve import resolve
    from apb.models.loading import load_config
    from apb.models.placement import resolve_device, resolve_dtype, torch_dtype
    from apb.models.shape import model_shape, rope_border

    cache = Path(os.environ.get("APB_CACHE") or default_cache_dir())
    with display.progress() as on_progress:
        path = resolve(model, on_progress=on_progress, cache_dir=cache)
    config = load_config(path)
    check_config(config)
    kinds = model_shape(config, torch_dtype(resolve_dtype(dtype, resolve_device(device), config))).kinds
    if any(not isinstance(kind, Full) or kind.sink or kind.soft_cap for kind in kinds):
        raise UserError(
            "nothing is trained for models with other layers than full attention",
            given=f"{model}, layers: {', '.join(sorted({kind.name for kind in kinds}))}",
            allowed="models whose every layer is full attention, without sinks or soft caps",
            remedy="Use decode=lookup, and compressors that need no training, or train for another model.",
        )
    if rope_border(config) is not None:
        raise UserError(
            "nothing is trained for models whose RoPE depends on the sequence's length (LongRoPE)",
            given=str(path),
            allowed="models that rotate sequences of all lengths alike",
            remedy="Choose another model.",
        )
    device = resolve_device(device)
    return Place(path, device, resolve_dtype(dtype, device, config), cache)
