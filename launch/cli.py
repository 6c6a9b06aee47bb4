"""The program ``apb``: stdout ends with one JSON document, however a command ends."""

from __future__ import annotations

import os
import sys

from launch.terminal.interrupt import interruptible

# For the time before the code that writes such documents is there.
_INTERRUPTED = (
    '{"error": {"type": "Interrupted", "given": "Ctrl-C", "allowed": "waiting", '
    '"remedy": "Run again; nothing was left behind.", "message": "interrupted"}}'
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    with interruptible():
        try:
            from launch.command.command import command  # seconds in which Ctrl-C may come, too

            code, text = command(words)
        except KeyboardInterrupt:
            code, text = 130, _INTERRUPTED
        _print(text)
    return code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # who read it, such as head, has seen enough; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
