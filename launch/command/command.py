"""One command: the command line taken apart, the verb run, its document or its error made out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from burst.errors import UserError, choose
from launch.terminal.arguments import Arguments, parse, unexpected
from launch.verbs.base import VERBS, Verb


def command(words: Sequence[str]) -> tuple[int, str]:
    """Run one command and return its exit code and what belongs on stdout."""
    verbose = False
    try:
        arguments = parse(words)
        verbose = arguments.verbose
        text = _text(arguments)
        if text is not None:
            return 0, text
        verb = _verb(arguments)
    except (Exception, KeyboardInterrupt) as error:
        from launch.terminal.display import Display
        from launch.terminal.output import failure, one_line

        code, document = failure(error, Display(), verbose)
        return code, one_line(document)
    from launch.command.runs import every_run  # rich and Hydra: help needs neither

    return every_run(verb, arguments)


def _text(arguments: Arguments) -> str | None:
    """Help or version, when that is what is asked for."""
    if arguments.version:
        try:
            return f"apb {importlib.metadata.version('apb-prefill')}"
        except importlib.metadata.PackageNotFoundError:
            return "apb (from a source folder, not installed)"
    if not arguments.help:
        return None
    from launch.command.help import overview, verb_help

    if not arguments.words:
        return overview()
    name, *more = arguments.words
    return verb_help(VERBS.get(choose("verb", name, VERBS))(), more[0] if more else None)


def _verb(arguments: Arguments) -> Verb:
    """Return the verb that is named; raises UserError for words and options that it does not take."""
    if not arguments.words:
        raise UserError(
            "no verb given",
            given=" ".join(arguments.overrides) or "nothing",
            allowed=", ".join(VERBS),
            remedy="Start with 'apb ask', or see 'apb --help'.",
        )
    name, *more = arguments.words
    verb = VERBS.get(choose("verb", name, VERBS))()
    if more[1:] or (more and verb.names is None):
        raise unexpected(more[-1], name)
    for option, given, takes in (
        ("-d", arguments.document is not None, verb.document),
        ("-q", arguments.query is not None, verb.query),
        ("-m", arguments.multirun, verb.sweeps),
    ):
        if given and not takes:
            raise UserError(
                f"'apb {name}' takes no {option}",
                given=option,
                allowed=f"apb {name} --help",
                remedy=f"Leave {option} out.",
            )
    return verb
