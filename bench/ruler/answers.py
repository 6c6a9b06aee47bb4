"""Full attention's distributions over a sample's first answer tokens, from which others are a distance away."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class FullAnswers:
    """Distributions by key, in ``folder``/full or, without a folder, in memory: large, and soon made again."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / "full"
        self._memory: dict[str, Tensor] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, first_FV: Tensor) -> None:
        """Keep a sample's distributions."""
        if self._folder is None:
            self._memory[key] = first_FV
        else:
            save_file({"first": first_FV.contiguous()}, _file(self._folder, key))

    def get(self, key: str) -> Tensor | None:
        """Return a sample's distributions, or None."""
        if self._folder is None:
            return self._memory.get(key)
        file = _file(self._folder, key)
        return load_file(file)["first"] if file.exists() else None


def _file(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
