"""A model folder's weight files: which there are, whether they are whole, and whether they can be those of config.json.

Everything here reads tables of tensors only; nothing is allocated by what they or config.json claim.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from apb.files.tables import Shapes, pickle_table, safetensors_entries, safetensors_table
from apb.models.files import damaged, read_json
from burst.errors import UserError

# In transformers' order; the first that is there is read.
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_LEAST = 0.9  # of a model's numbers must be in its files: transformers allocates the others before it misses them


def weights_file(folder: Path) -> Path:
    """Return the file that the weights are read from, or through; raises UserError when there is none."""
    for name in (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX):
        if (folder / name).exists() or (folder / name).is_symlink():
            return folder / name
    raise UserError(
        f"the model folder {folder} holds no weights",
        given=str(folder),
        allowed=f"{SAFETENSORS}, or {SAFETENSORS_INDEX} and its shards",
        remedy="Copy or download the weights into the folder.",
    )


def held(folder: Path) -> list[str] | None:
    """Return the names of the folder's tensors, by its index or its file alone; None where it has neither."""
    for name in (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX):
        if (folder / name).exists():
            return list(_placed(folder / name) if name.endswith(".json") else _table(folder / name))
    return None


def check_weights(folder: Path) -> Shapes:
    """Return the shapes of the folder's tensors; raises UserError naming the first file that is not whole."""
    file = weights_file(folder)
    if file.suffix != ".json":
        return _table(file)
    placed = _placed(file)
    tables = {shard: _table(folder / shard) for shard in sorted(set(placed.values()))}
    for name, shard in placed.items():
        if name not in tables[shard]:
            raise damaged(folder / shard, f"the tensor {name} is missing from it")
    return {name: tables[shard][name] for name, shard in placed.items()}


def check_types(folder: Path) -> dict[str, str]:
    """Return the types of the folder's tensors as safetensors names them; raises UserError for other files."""
    file = weights_file(folder)
    if file.name not in (SAFETENSORS, SAFETENSORS_INDEX):
        raise damaged(file, "quantised weights are read from safetensors files only")
    shards = sorted(set(_placed(file).values())) if file.suffix == ".json" else [file.name]
    return {name: kind for s in shards for name, (_, kind) in safetensors_entries(folder / s, damaged).items()}


def check_fit(folder: Path, found: Shapes, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Reject weights that are far fewer than config.json says; raises UserError.

    ``wanted``: the shapes of the model's own parameters. Files may name and cut them otherwise, so numbers are counted.
    """
    if sum(map(math.prod, found.values())) >= _LEAST * sum(map(math.prod, wanted.values())):
        return
    missing = sorted(wanted.keys() - found.keys())
    other = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    raise not_fitting(folder, missing, other)


def not_fitting(folder: Path, missing: list[str], other: list[str]) -> UserError:
    """Return the error for weights without some tensors of config.json's model, or with others in their places."""
    what, names = ("lacks", missing) if missing else ("has another shape for", other)
    first = f"the tensor {names[0]}" if names else "most of its weights"
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return damaged(weights_file(folder), f"against config.json it {what} {first}{more}")


@contextmanager
def readable(folder: Path) -> Iterator[Path]:
    """Yield a folder that transformers can read: this one, or links to its files beside an index that is complete.

    An index without ``metadata`` is good, but transformers asks for it.
    """
    file = weights_file(folder)
    index = read_json(file) if file.suffix == ".json" else {"metadata": {}}
    if isinstance(index.get("metadata"), dict):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="apb-") as made:
        links = Path(made)
        for each in folder.iterdir():
            if each != file:
                (links / each.name).symlink_to(each.resolve())
        (links / file.name).write_text(json.dumps(index | {"metadata": {}}))
        yield links


def _table(file: Path) -> Shapes:
    return safetensors_table(file, damaged) if file.suffix == ".safetensors" else pickle_table(file, damaged)


def _placed(index: Path) -> dict[str, str]:
    """Return the shard of each tensor; raises UserError for an index that has none, or leads out of the folder."""
    placed: Any = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise damaged(index, "it has no weight_map")
    suffix = ".safetensors" if index.name == SAFETENSORS_INDEX else ".bin"
    for shard in set(placed.values()):
        parts = PurePosixPath(shard)
        if parts.is_absolute() or ".." in parts.parts or "\0" in shard or parts.suffix != suffix:
            raise damaged(index, f"it names the shard {shard[:100]!r}")
    return dict(placed)
