"""One command: the command line taken apart, the verb run, its document or its error made out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burst.errors import UserError, choose
from launch.config.compose import compose, expand
from launch.terminal.arguments import Arguments, parse, unexpected
from launch.terminal.display import Display
from launch.terminal.output import DONE, FAILED, INTERRUPTED, USER, failure, kept, one_line
from launch.terminal.quiet import quiet
from launch.verbs.help import overview, verb_help
from launch.verbs.verbs import VERBS, Run, load


def command(words: Sequence[str]) -> tuple[int, str]:
    """Run one command and return its exit code and what belongs on stdout."""
    display = Display()
    verbose = False
    try:
        arguments = parse(words)
        verbose = arguments.verbose
        text = _text(arguments)
        if text is not None:
            return DONE, text
        with quiet(verbose):
            code, document = _verb(arguments, display)
    except (Exception, KeyboardInterrupt) as error:
        code, document = failure(error, display, verbose)
    return code, one_line(document)


def _text(arguments: Arguments) -> str | None:
    """Help or version, when that is what is asked for."""
    if arguments.version:
        try:
            return f"apb {importlib.metadata.version('apb-prefill')}"
        except importlib.metadata.PackageNotFoundError:
            return "apb (from a source folder, not installed)"
    if not arguments.help:
        return None
    if not arguments.words:
        return overview()
    return verb_help(choose("verb", arguments.words[0], VERBS))


def _verb(arguments: Arguments, display: Display) -> tuple[int, dict[str, Any]]:
    if not arguments.words:
        raise UserError(
            "no verb given",
            given=" ".join(arguments.overrides) or "nothing",
            allowed=", ".join(VERBS),
            remedy="Start with 'apb ask', or see 'apb --help'.",
        )
    name, *more = arguments.words
    verb = VERBS[choose("verb", name, VERBS)]
    if more[1:] or (more and verb.name is None):
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
    run = load(name)
    chosen = [f"{name}={word}" for word in more]  # NAME chooses from the configuration group of that name
    if arguments.multirun:
        return _sweep(run, name, arguments, [*chosen, *arguments.overrides], display)
    return _once(run, name, arguments, [*chosen, *arguments.overrides], display)


def _once(
    run: Run, name: str, arguments: Arguments, overrides: Sequence[str], display: Display, part: str = ""
) -> tuple[int, dict[str, Any]]:
    """Run a verb with one configuration; a sweep's runs are kept in folders of their own."""
    try:
        config = compose(name, overrides)
        out = config.get("out")
        folder = str(Path(out) / part) if out else None
        if out and not VERBS[name].gathers:
            config["out"] = folder
        with kept(folder, config, display) as result:
            code = DONE
            try:
                document = run(arguments, config, display)
            except (Exception, KeyboardInterrupt) as error:  # told here, so that the log has it too
                code, document = failure(error, display, arguments.verbose)
            result.update(document)
            return code, document
    except (Exception, KeyboardInterrupt) as error:
        return failure(error, display, arguments.verbose)


def _sweep(
    run: Run, name: str, arguments: Arguments, given: Sequence[str], display: Display
) -> tuple[int, dict[str, Any]]:
    """Run a verb once for every combination; a run that fails does not lose the others."""
    runs: list[dict[str, Any]] = []
    codes = {DONE}
    every = expand(given)
    for number, overrides in enumerate(every):
        display.note(f"Run {number + 1} of {len(every)}: {' '.join(overrides)}", style="bold")
        code, document = _once(run, name, arguments, overrides, display, str(number))
        codes.add(code)
        runs.append({"overrides": overrides, **document})
        if code == INTERRUPTED:
            break
    worst = next(code for code in (INTERRUPTED, FAILED, USER, DONE) if code in codes)
    return worst, {"runs": runs}
