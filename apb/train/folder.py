"""A folder that one training job works in, found again by the same settings and closed to others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from burst.errors import UserError

OnProgress = Callable[[str, int, int], None]  # phase, done, total
_JOB = "job.json"


def digest(text: str) -> str:
    """Return what a job says of its text."""
    return hashlib.sha256(text.encode()).hexdigest()


def claim(folder: Path, mine: Mapping[str, Any]) -> None:
    """Make the folder that of the job ``mine``; raises UserError when it is another's."""
    file = folder / _JOB
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
        return
    theirs = json.loads(file.read_text(encoding="utf-8"))
    if theirs != mine:
        differing = [key for key in mine if theirs.get(key) != mine[key]]
        raise UserError(
            f"the folder {folder} holds the training of another job",
            given=", ".join(f"{key}={mine[key]}" for key in differing),
            allowed=", ".join(f"{key}={theirs.get(key)}" for key in differing),
            remedy="Choose another out=DIR, or the settings it was begun with.",
        )
