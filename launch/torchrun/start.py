"""The command line on rank 0 of torchrun's processes, with the other ranks at its command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from burst.errors import UserError
from launch.terminal.output import FAILED, USER, told
from launch.torchrun.guard import Guard
from launch.torchrun.ranks import ranks


def arguments(argv: Sequence[str]) -> list[str]:
    """Complete a command line: ``ask`` where no verb stands, this cluster where none is chosen."""
    from launch.terminal.arguments import parse

    words = list(argv)
    try:
        found = parse(words)
    except UserError:  # said again, and shown properly, by the command line itself
        return words
    if not found.words:
        words.insert(0, "ask")
    if not any(override.startswith("cluster=") for override in found.overrides):
        words.append("cluster=torchrun")
    return words


def lead(program: Callable[[], int | None]) -> int:
    """Run ``program`` on rank 0, with the other ranks at its command; return its exit code (None: 0).

    Outside torchrun it runs as it is. The other ranks do not return.
    """
    if "RANK" not in os.environ:
        return program() or 0
    try:
        here = ranks()
    except UserError as error:
        first_here = os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0"
        return told(error) if first_here else USER
    if here.follower is not None:
        # At once: torchrun ends what is still there when rank 0 has failed, and calls that another failure.
        os._exit(here.follower.follow())
    leader = here.leader
    assert leader is not None
    guard = Guard(leader.beat)
    code: int | None = FAILED
    try:
        code = program() or 0
        return code
    finally:
        guard.dismiss()
        leader.stop(failed=code != 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on rank 0 and follow it on the others; return the exit code."""

    def command_line() -> int:
        from launch.cli import main

        return main(arguments(sys.argv[1:] if argv is None else argv))

    return lead(command_line)
