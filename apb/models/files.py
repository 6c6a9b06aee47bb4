"""Checks of a model folder's files that cost milliseconds, so that damage is named, not computed with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apb.files.tables import safetensors_table
from burst.errors import UserError

MANIFEST = "MANIFEST.json"  # written last into folders that this package made; says what each file must be
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # of configurations, tokenizers and templates
_TEXT_LIMIT_BYTES = 100_000_000  # published tokenizers have up to 35 million

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
        _check_text(file)
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise damaged(file, "it is missing") from error
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, f"it cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(file, "it holds no JSON object")
    return value


def check_texts(folder: Path) -> None:
    """Reject a folder whose texts are none, or larger than any model's; raises UserError that names the file.

    Libraries read them whole, and would wait for a pipe for ever.
    """
    for place in (folder, folder / "additional_chat_templates"):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.suffix in _TEXTS and file.exists():
                _check_text(file)


def _check_text(file: Path) -> None:
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise damaged(file, "it is no regular file")
    if about.st_size > _TEXT_LIMIT_BYTES:
        raise damaged(file, f"it has {about.st_size} bytes, of which {_TEXT_LIMIT_BYTES} can be read")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, with the next where it only announces that."""
    lines = [line.strip() for line in str(error)[:4000].splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]


@contextlib.contextmanager
def reading(file: Path, allowed: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model's file into a UserError that names the file.

    Validation and parsers raise many kinds, some private to huggingface_hub, some plain Exception; and the Rust of
    tokenizers panics, which Python sees as a BaseException. All of them mean this file.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"
        if out_of_memory or (not isinstance(error, Exception) and type(error).__name__ != "PanicException"):
            raise
        raise UserError(
            f"the model file {file} cannot be used: {first_line(error)}",
            given=str(file),
            allowed=allowed,
            remedy=f"Copy or download {file.name} again, choose another model, or update transformers.",
        ) from error


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
        if not os.path.isfile(file):
            raise damaged(file, "it is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise damaged(file, f"it has {size} bytes, expected {entry['bytes']}")
        weights = file.suffix == ".safetensors"
        if weights:
            safetensors_table(file, damaged)
        if (full or not weights) and sha256(file) != entry["sha256"]:
            raise damaged(file, f"its SHA-256 is not {entry['sha256']}")


def _entries(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise damaged(folder / MANIFEST, "it lists no files")
    yield from files.items()


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


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
