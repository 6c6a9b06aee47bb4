"""The key of a run, which its processes share: from the environment, or on one machine from a private file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from burst.errors import UserError

KEY_ENV = "APB_KEY"
_SHORTEST = 16  # characters


def given_key() -> bytes | None:
    """Return the key that the environment holds, if any; raises UserError for one that is easily guessed."""
    text = os.environ.get(KEY_ENV)
    if text is None:
        return None
    if len(text) < _SHORTEST:
        raise UserError(
            f"{KEY_ENV} is too short",
            given=f"{len(text)} characters",
            allowed=f"{_SHORTEST} characters or more, the same on every machine",
            remedy=f"Write in the script that runs torchrun on each machine: export {KEY_ENV}=$(openssl rand -hex 32), "
            "with the number made once.",
        )
    return hashlib.sha256(text.encode()).digest()


def no_key() -> UserError:
    """Return the error of processes on several machines that have no key in common."""
    return UserError(
        "processes on several machines need a key in common, by which they know each other's commands",
        given=f"no {KEY_ENV}",
        allowed=f"{KEY_ENV}={_SHORTEST} characters or more, the same on every machine",
        remedy=f"Make one with 'openssl rand -hex 32' and export it as {KEY_ENV} wherever you run torchrun.",
    )


class KeyFile:
    """A file of mode 0600 in a folder of mode 0700, named by the run, through which rank 0 hands the key on."""

    def __init__(self, run: str) -> None:
        self._path = _folder() / hashlib.sha256(run.encode()).hexdigest()[:32]

    def write(self) -> bytes:
        """Make a key and leave it for the other processes."""
        key = secrets.token_bytes(32)
        draft = self._path.with_suffix(f".{secrets.token_hex(8)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(key)
        draft.replace(self._path)
        return key

    def read(self) -> bytes | None:
        """Return the key, None where no process of this machine and user left one."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        """Take the file away; may be called twice."""
        with contextlib.suppress(OSError):
            self._path.unlink()


def _folder() -> Path:
    """Return this user's own folder; raises UserError where somebody else could get at it."""
    folder = Path(tempfile.gettempdir()) / f"apb-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            "the folder for the key of this run is open to others",
            given=f"{folder}, mode {stat.S_IMODE(found.st_mode):o}, owner {found.st_uid}",
            allowed="a folder of this user's with mode 700",
            remedy=f"Remove it, or set {KEY_ENV}, or point TMPDIR at another folder.",
        )
    return folder
