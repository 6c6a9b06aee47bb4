"""The runs of one command: one configuration, or every combination of a sweep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burst.errors import UserError
from launch.config.compose import compose
from launch.config.schema import Schema
from launch.config.sweeps import expand
from launch.terminal.arguments import Arguments
from launch.terminal.display import Display
from launch.terminal.output import DONE, FAILED, INTERRUPTED, USER, failure, kept, one_line
from launch.terminal.quiet import quiet
from launch.verbs.base import Verb


def every_run(verb: Verb, arguments: Arguments) -> tuple[int, str]:
    """Run a verb as the arguments say; return the exit code and the document."""
    display = Display()
    try:
        with quiet(arguments.verbose):
            schema = verb.schema()
            # NAME chooses from the configuration's group of the verb's name.
            words = [*(f"{verb.name}={word}" for word in arguments.words[1:]), *arguments.overrides]
            if arguments.multirun:
                code, document = _sweep(verb, schema, arguments, words, display)
            else:
                code, document = _once(verb, schema, arguments, words, display)
    except (Exception, KeyboardInterrupt) as error:
        code, document = failure(error, display, arguments.verbose)
    return code, one_line(document)


def _presets(arguments: Arguments) -> Path | None:
    if arguments.presets is None:
        return None
    folder = Path(arguments.presets)
    if not os.path.isdir(folder):
        raise UserError(
            "there is no such folder of presets",
            given=f"--config-dir {arguments.presets}",
            allowed="a folder",
            remedy="Check the path.",
        )
    return folder


def _once(
    verb: Verb, schema: Schema, arguments: Arguments, words: Sequence[str], display: Display, part: str = ""
) -> tuple[int, dict[str, Any]]:
    """Run a verb with one configuration; a sweep's runs are kept in folders of their own."""
    code, document = DONE, dict[str, Any]()
    try:
        config = compose(schema, words, _presets(arguments))
        out = config.values.get("out")
        folder = str(Path(out) / part) if out else None
        if out and not verb.gathers:
            config.values["out"] = folder
        with kept(folder, config.values, display) as result:
            try:
                document = verb.run(arguments, config, display)
            except (Exception, KeyboardInterrupt) as error:  # told here, so that the log has it too
                code, document = failure(error, display, arguments.verbose)
            result.update(document)
    except (Exception, KeyboardInterrupt) as error:
        failed, told = failure(error, display, arguments.verbose)
        code, document = _worst({code, failed}), {**document, **told}  # a result that cannot be kept is not lost
    return code, document


def _sweep(
    verb: Verb, schema: Schema, arguments: Arguments, given: Sequence[str], display: Display
) -> tuple[int, dict[str, Any]]:
    """Run a verb once for every combination; a run that fails does not lose the others."""
    runs: list[dict[str, Any]] = []
    codes = {DONE}
    every = expand(schema, given, _presets(arguments))
    for number, words in enumerate(every):
        display.note(f"Run {number + 1} of {len(every)}: {' '.join(words)}", style="bold")
        code, document = _once(verb, schema, arguments, words, display, str(number))
        codes.add(code)
        runs.append({"overrides": words, **document})
        if code == INTERRUPTED:
            break
    return _worst(codes), {"runs": runs}


def _worst(codes: set[int]) -> int:
    return next(code for code in (INTERRUPTED, FAILED, USER, DONE) if code in codes)
