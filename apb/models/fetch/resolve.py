"""Resolution of a model's name to a local folder with its files."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from apb.models.fetch.embedded import EMBEDDED, default_cache_dir, ensure
from apb.models.fetch.hub import download
from apb.models.files import Progress, silent
from burst.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LONGEST = 4095  # characters of a path
_ALLOWED = f"{', '.join(sorted(EMBEDDED))}, a local folder with config.json, or a hub id 'organisation/model'"


def resolve(name: str, *, on_progress: Progress | None = None, cache_dir: Path | None = None) -> Path:
    """Return the local folder (with config.json) of the model that ``name`` means, fetched if need be.

    ``name`` is an embedded model's name, else a local folder, else a hub id; ``cache_dir`` holds the embedded
    models (default ``~/.cache/apb-prefill``). ``on_progress(phase, done, total)`` may be called from other
    threads, one call at a time. Raises UserError for anything that leads to no folder, with what to change.
    """
    report = on_progress or silent
    if len(name) > _LONGEST or "\0" in name:
        raise UserError(
            "no model has such a name",
            given=f"{name[:80]!r}, {len(name):,} characters",
            allowed=_ALLOWED,
            remedy="Check the path.",
        )
    if name in EMBEDDED:
        return ensure(EMBEDDED[name], cache_dir or default_cache_dir(), report)
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    if name and path.is_dir():
        return _folder(path)
    if name and path.exists():
        raise UserError(
            f"the model '{name}' is a file",
            given=name,
            allowed=_ALLOWED,
            remedy="Give the folder that holds config.json, the weights and the tokenizer.",
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(
            f"the model folder '{name}' does not exist",
            given=name,
            allowed=_ALLOWED,
            remedy=_nearest(path.name, _siblings(path), "Check the path."),
        )
    if _HUB_ID.fullmatch(name):
        return download(name, report)
    raise UserError(
        f"unknown model '{name}'",
        given=name,
        allowed=_ALLOWED,
        remedy=_nearest(name, [*EMBEDDED, *_siblings(path)], f"Choose one of: {_ALLOWED}."),
    )


def _folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        inside = [p.parent.name for p in path.glob("*/config.json")]
        hint = f"Did you mean {' or '.join(str(path / i) for i in sorted(inside)[:3])}?" if inside else ""
        raise UserError(
            f"the folder '{path}' has no config.json, so it is no Hugging Face model",
            given=str(path),
            allowed=_ALLOWED,
            remedy=hint or "Give the folder that holds config.json, the weights and the tokenizer.",
        )
    return path.resolve()


def _siblings(path: Path) -> list[str]:
    try:
        return [p.name for p in path.parent.iterdir() if p.is_dir() and (p / "config.json").is_file()]
    except OSError:
        return []


def _nearest(name: str, names: list[str], otherwise: str) -> str:
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(by_lower[n] for n in near)}?" if near else otherwise
