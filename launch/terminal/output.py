"""JSON documents: what a failure becomes, and what ``out=DIR`` writes."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from burst.errors import HostFailure, UserError
from launch.terminal.display import Display
from launch.terminal.interrupt import handled

DONE, FAILED, USER, INTERRUPTED = 0, 1, 2, 130
# What files and folders answer, and the user can mend.
_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENFILE),
}


def one_line(document: Mapping[str, Any]) -> str:
    """Return the document as one line of ASCII, which no terminal, locale or line splitter can break.

    JSON has no infinity: numbers that are not finite become null.
    """
    try:
        return json.dumps(document, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(document), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failure(error: BaseException, display: Display, verbose: bool) -> tuple[int, dict[str, Any]]:
    """Tell people of an error and return the exit code and the document for it."""
    if isinstance(error, OSError) and error.errno in _MACHINE:
        error = _of_machine(error)
    if isinstance(error, MemoryError):
        error = _of_memory(error)
    if isinstance(error, UserError):
        shown = [error.message, str(error.given), str(error.allowed), error.remedy]
        code, kind, (message, given, allowed, remedy) = USER, type(error).__name__, shown
    elif isinstance(error, KeyboardInterrupt):
        handled()
        code, kind, message, given, allowed = INTERRUPTED, "Interrupted", "interrupted", "Ctrl-C", "waiting"
        remedy = "Run again; nothing was left behind."
    elif isinstance(error, HostFailure):
        code, kind, message = FAILED, "HostFailure", str(error)
        peer = "" if error.peer is None else f", peer {error.peer}"
        given, allowed = f"host {error.rank}, step '{error.step}'{peer}", "hosts that answer within timeout_s"
        remedy = "Run again. If the host was only slow, raise timeout_s; if memory ran out, see 'apb plan'."
    else:
        code, kind, message = FAILED, type(error).__name__, str(error) or type(error).__name__
        given, allowed = _place(error), "no such error"
        remedy = "A bug, or the machine ran out of something. Run again with --verbose for the traceback."
    if code == FAILED and verbose:
        display.raw("".join(traceback.format_exception(error)))
    display.note(f"{'Error' if code != INTERRUPTED else 'Stopped'}: {message}", style="bold red")
    if code != INTERRUPTED:
        for label, text in (("given", given), ("allowed", allowed), ("remedy", remedy)):
            display.note(f"  {label + ':':8} {text}")
    keys = {"type": kind, "given": given, "allowed": allowed, "remedy": remedy, "message": message}
    return code, {"error": keys}


def told(error: BaseException) -> int:
    """Tell of an error where no command is under way yet, on both streams; return the exit code."""
    code, document = failure(error, Display(), verbose=False)
    sys.stdout.write(one_line(document) + "\n")
    return code


def _of_machine(error: OSError) -> UserError:
    what = str(error.filename) if error.filename else "a file of this run"
    return UserError(
        f"{what} cannot be read or written: {error.strerror or error}",
        given=what,
        allowed="files that can be read, folders that can be written, and room on the disk",
        remedy="Free some space or mend the permissions, then run again.",
    )


def _of_memory(error: MemoryError) -> UserError:
    return UserError(
        f"this process ran out of memory: {error or 'no more is to be had'}",
        given=_place(error),
        allowed="what this machine's memory holds",
        remedy="Lower lengths, hosts or batch sizes.",
    )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "nowhere"
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name}"


@contextlib.contextmanager
def kept(out: str | None, config: Mapping[str, Any], display: Display) -> Iterator[dict[str, Any]]:
    """With a folder, write config.yaml and apb.log there at once, and what the caller puts into the yielded
    dictionary as result.json at the end. Raises UserError when the folder cannot be written."""
    result: dict[str, Any] = {}
    if out is None:
        yield result
        return
    from omegaconf import OmegaConf

    folder = Path(out)
    log = contextlib.ExitStack()
    with _written(out):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))), encoding="utf-8")
        log.enter_context(display.logging_to(folder / "apb.log"))
    try:
        yield result
    finally:
        with _written(out):
            log.close()
    with _written(out):
        (folder / "result.json").write_text(one_line(result) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _written(out: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise UserError(
            f"the folder for results cannot be written: {error}",
            given=f"out={out}",
            allowed="a folder that can be made and written",
            remedy="Choose another out=DIR.",
        ) from error
