"""A Ray of this machine alone: on loopback, with a folder and a token that only its user can read."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Ray takes the loopback address for its own only where clusters are switched off, as they are on macOS.
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def private_folder() -> Path:
    """Make a folder of mode 0700 for one Ray, so that runs do not meet and others cannot enter.

    Short, since a socket's path may have 107 characters.
    """
    return Path(tempfile.mkdtemp(prefix="apb-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))


@contextlib.contextmanager
def loopback(ray: Any) -> Iterator[None]:
    """Have a Ray that is started inside listen on 127.0.0.1, and its processes likewise."""
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    said, os.environ[_CLUSTERS] = os.environ.get(_CLUSTERS), "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        del os.environ[_CLUSTERS]
        if said is not None:
            os.environ[_CLUSTERS] = said


class Token:
    """Ray's token authentication with a token of this run, where the user has settled nothing else.

    Ray's own token file is the same for all runs, and every user of the machine can read it.
    """

    def __init__(self, folder: Path) -> None:
        self._set: list[str] = []
        mode = os.environ.get(_MODE, "token").lower()
        if mode == "token" and _TOKEN not in os.environ and _PATH not in os.environ:
            file = folder / "token"
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32))
            self._put(_PATH, str(file))
        if _MODE not in os.environ:
            self._put(_MODE, "token")
        _reread()

    def forget(self) -> None:
        """Restore what the environment said before."""
        for name in self._set:
            os.environ.pop(name, None)
        self._set = []
        _reread()

    def _put(self, name: str, value: str) -> None:
        os.environ[name] = value
        self._set.append(name)


def _reread() -> None:
    """Have this process's Ray read the environment again."""
    import ray

    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
