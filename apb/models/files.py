"""Checks of a model folder's files that cost milliseconds, so that damage is named, not computed with."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from burst.errors import UserError

MANIFEST = "MANIFEST.json"  # written last into folders that this package made; says what each file must be
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors format's own bound on its header

Progress = Callable[[str, int, int], None]
"""``(phase, done, total)``: bytes while fetching or unpacking, steps otherwise; total 0 when unknown."""


def silent(phase: str, done: int, total: int) -> None:
    """Report nothing: the default where a progress callback is taken."""


def damaged(file: Path, what: str) -> UserError:
    """Return the error for a bad model file, with the remedy that fits its folder."""
    folder = file.parent
    remedy = _replace(folder) if (folder / MANIFEST).exists() else f"Copy or download {file.name} into {folder} again."
    return UserError(
        f"the model file {file} is damaged: {what}",
        given=str(file),
        allowed="a model folder as it was published",
        remedy=remedy,
    )


def _replace(folder: Path) -> str:
    return f"Delete the folder {folder}: in the cache it is fetched again on the next run; copy it again elsewhere."


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON file's object; raises UserError naming the file when it is missing or damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise damaged(file, "it is missing") from error
    except (OSError, ValueError) as error:
        raise damaged(file, f"it cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(file, "it holds no JSON object")
    return value


def read_header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's header (tensor name -> dtype, shape, offsets in bytes), the data unread.

    Raises UserError naming the file when header and file size disagree, as they do after an interrupted copy.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
                raise damaged(file, f"{size} bytes are too few for its header")
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except FileNotFoundError as error:
        raise damaged(file, "it is missing") from error
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged(file, "its header cannot be read") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise damaged(file, f"it has {size} bytes where its header says {expected}")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def check_weights(folder: Path) -> None:
    """Check that the folder's weights are all there and complete; raises UserError naming the first bad file.

    Weights in older formats (``pytorch_model*.bin``) have no cheap check and are left to the loader.
    """
    if (folder / WEIGHTS).exists():
        read_header(folder / WEIGHTS)
    elif (folder / INDEX).exists():
        _check_shards(folder)
    elif not any(folder.glob("pytorch_model*.bin*")):
        raise UserError(
            f"the model folder {folder} holds no weights",
            given=str(folder),
            allowed=f"{WEIGHTS}, or {INDEX} and its shards",
            remedy="Copy or download the weights into the folder.",
        )


def _check_shards(folder: Path) -> None:
    index = folder / INDEX
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise damaged(index, "it has no weight_map")
    headers = {shard: read_header(folder / shard) for shard in sorted(set(placed.values()))}
    for name, shard in placed.items():
        if name not in headers[shard]:
            raise damaged(folder / shard, f"the tensor {name} is missing from it")


def sha256(file: Path) -> str:
    """Return the file's SHA-256 as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    """Record every file's size and hash; ``source`` says what the folder was made from."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n")


def check_manifest(folder: Path, *, full: bool = False) -> None:
    """Check a folder against its manifest in some milliseconds; raises UserError naming the first bad file.

    Small files are hashed; weights are compared by size and header, and hashed only when ``full``.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"the folder {folder} is no complete model of this package's cache",
            given=str(folder),
            allowed=f"a folder with {MANIFEST}",
            remedy=_replace(folder),
        )
    for name, entry in _entries(folder):
        file = folder / name
        if not file.is_file():
            raise damaged(file, "it is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise damaged(file, f"it has {size} bytes, expected {entry['bytes']}")
        weights = file.suffix == ".safetensors"
        if weights:
            read_header(file)
        if (full or not weights) and sha256(file) != entry["sha256"]:
            raise damaged(file, f"its SHA-256 is not {entry['sha256']}")


def _entries(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not all({"bytes", "sha256"} <= set(entry) for entry in files.values()):
        raise damaged(folder / MANIFEST, "it lists no files")
    yield from files.items()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off stderr: people see our own, and errors are raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
