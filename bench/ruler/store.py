"""Where measured samples are kept: one JSON line each, and full attention's distributions beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.rows import Rows

FILE = "samples.jsonl"


class Store:
    """Rows by key, in ``folder`` or, without one, in memory. What a killed run wrote is found again.

    Distributions go to the folder's ``full/``: they are large, can be made again, and need not be kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._rows = Rows(None if folder is None else folder / FILE)
        self._full: dict[str, Tensor] = {}
        if folder is not None:
            (folder / "full").mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first; of a sample that was measured again with decoding, the later one."""
        latest = {(row["model"], row["dtype"], row["variant"], row["index"]): row for row in self._rows}
        return list(latest.values())

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row; it is on disk when this returns."""
        self._rows.add(key, row)

    def put_full(self, key: str, first_FV: Tensor) -> None:
        """Keep full attention's distributions over a sample's first answer tokens."""
        if self.folder is None:
            self._full[key] = first_FV
        else:
            save_file({"first": first_FV.contiguous()}, self._file(key))

    def full(self, key: str) -> Tensor | None:
        """Return those distributions, or None."""
        if self.folder is None:
            return self._full.get(key)
        file = self._file(key)
        return load_file(file)["first"] if file.exists() else None

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / "full" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
