"""Standard streams that may be closed, full or broken: none of that loses a run or changes what it says."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class Lasting:
    """A text stream that takes everything: what the one below cannot take is dropped. ``failed``: why, if it was."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failed: Exception | None = None

    def write(self, text: str) -> int:
        """Write, if the stream still takes anything."""
        if self._stream is not None and self.failed is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self.failed = error
        return len(text)

    def flush(self) -> None:
        """Flush, if the stream still takes anything."""
        if self._stream is not None and self.failed is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.failed = error

    def isatty(self) -> bool:
        """Whether people read it as it is written."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)


def hold() -> None:
    """Open what is closed of the standard streams' descriptors to nowhere, so that no file takes their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def say(text: str) -> str | None:
    """Write the document to stdout, and return why it was not, if so. Readers that left early have seen enough."""
    if sys.stdout is None:
        return "standard output is closed"
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _drop()
        return None if isinstance(error, BrokenPipeError) else str(error)
    return None


def _drop() -> None:
    """Send what Python would flush at its end nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = None
