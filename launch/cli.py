"""The program ``apb``: stdout ends with one JSON document, however a command ends."""

from __future__ import annotations

import atexit
import os
import sys

from launch.terminal.interrupt import interruptible
from launch.terminal.streams import hold, say

# For the time before the code that writes such documents is there.
_INTERRUPTED = (
    '{"error": {"type": "Interrupted", "given": "Ctrl-C", "allowed": "waiting", '
    '"remedy": "Run again; nothing was left behind.", "message": "interrupted"}}'
)
_codes: list[int] = []  # of the commands run


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if argv is None:
        atexit.register(_leave)  # first, so that all others have run
    hold()
    with interruptible():
        try:
            from launch.command.command import command  # seconds in which Ctrl-C may come, too

            code, text = command(words)
        except KeyboardInterrupt:
            code, text = 130, _INTERRUPTED
        _codes.append(code)
        lost = say(text)
    if lost is not None:
        print(f"The result could not be written: {lost}", file=sys.stderr)
    return code if lost is None else code or 1


def _leave() -> None:
    """End the program at once after an interrupt: libraries of C++ that were cut off in their start may crash when
    they are taken apart, and give a code of their own."""
    if _codes and _codes[-1] == 130:
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
