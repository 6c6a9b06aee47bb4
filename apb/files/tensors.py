"""Files of small heads: which one a name means, and what is in safetensors and torch state dicts."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apb.files.tables import Damaged, Shapes, pickle_table, pickle_tensors, safetensors_table
from burst.errors import UserError


def find(
    name: str, shipped: Mapping[str, Path], there: Callable[[Path], bool], *, problem: str, allowed: str, remedy: str
) -> Path:
    """Return what ``name`` means: a shipped file, else a path that is ``there``; raises UserError when there is none.

    The error states the ``problem`` with the name, what is ``allowed`` beside the shipped ones, and the nearest of
    their names, else the ``remedy``.
    """
    if name in shipped:
        return shipped[name]
    path = Path(name).expanduser()
    if there(path):
        return path
    near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.5)
    raise UserError(
        f"{problem} '{name}'",
        given=name,
        allowed=f"{', '.join(shipped) or 'no shipped heads'}, or {allowed}",
        remedy=f"Did you mean {' or '.join(near)}?" if near else remedy,
    )


def read(file: Path, damaged: Damaged) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU; raises ``damaged``'s error for what cannot be read."""
    if file.suffix != ".safetensors":
        return dict(pickle_tensors(file, damaged, "cpu"))
    safetensors_table(file, damaged)
    with _reading(file, damaged), safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def shapes(file: Path, damaged: Damaged) -> Shapes:
    """Return the shapes of a file's tensors by name, their numbers unread; raises as ``read``."""
    return safetensors_table(file, damaged) if file.suffix == ".safetensors" else pickle_table(file, damaged)


@contextlib.contextmanager
def _reading(file: Path, damaged: Damaged) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise damaged(file, f"it cannot be read ({error})") from error


def metadata(file: Path, damaged: Damaged) -> dict[str, str]:
    """Return what a safetensors file says of itself, empty for others; raises ``damaged``'s error."""
    if file.suffix != ".safetensors":
        return {}
    safetensors_table(file, damaged)
    with _reading(file, damaged), safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def write(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file, ``about`` as metadata; whole or not at all."""
    unfinished = file.with_suffix(".part")
    save_file(dict(tensors), unfinished, metadata=dict(about))
    unfinished.chmod(0o644)
    os.replace(unfinished, file)
