"""The program ``apb``: stdout ends with one JSON document, however a command ends."""

from __future__ import annotations

import sys

from launch.terminal.interrupt import interruptible
from launch.terminal.streams import hold, say

# For the time before the code that writes such documents is there.
_INTERRUPTED = (
    '{"error": {"type": "Interrupted", "given": "Ctrl-C", "allowed": "waiting", '
    '"remedy": "Run again; nothing was left behind.", "message": "interrupted"}}'
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    hold()
    with interruptible():
        try:
            from launch.command.command import command  # seconds in which Ctrl-C may come, too

            code, text = command(words)
        except KeyboardInterrupt:
            code, text = 130, _INTERRUPTED
        lost = say(text)
    if lost is not None:
        print(f"The result could not be written: {lost}", file=sys.stderr)
    return code if lost is None else code or 1


if __name__ == "__main__":
    sys.exit(main())
