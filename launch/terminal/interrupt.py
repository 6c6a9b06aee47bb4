"""Ctrl-C and termination end a command by KeyboardInterrupt, which unwinds through every host's end."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_AGAIN_S = 0.5


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, and see to it that none is lost.

    Python drops exceptions inside callbacks, such as those that run when a library forks, and some libraries
    catch everything while they are imported. So the interrupt is raised again until it is on its way up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hook = sys.unraisablehook

    def unraisable(dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            hook(dropped)

    # SIGINT too: shells start background jobs with it ignored, but who sends it means it.
    handlers = {signal.SIGINT: _interrupted, signal.SIGTERM: _interrupted, signal.SIGALRM: _again}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def keeping_handlers() -> Iterator[None]:
    """Keep the handlers for SIGINT and SIGTERM while code runs that would replace them, as Ray's start does.

    Ray's own handler for SIGTERM leaves by SystemExit, with a code of its own and no document, or is dropped.
    """
    module: Any = signal
    install = signal.signal
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def others(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in kept else install(number, handler)

    module.signal = others
    try:
        yield
    finally:
        module.signal = install
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                if callable(handler):  # below Python, too, code may have installed its own
                    install(number, handler)


def handled() -> None:
    """Say that an interrupt has arrived where it is dealt with."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupted(signum: int, frame: object) -> None:
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
    raise KeyboardInterrupt


def _again(signum: int, frame: object) -> None:
    if not _on_its_way():
        raise KeyboardInterrupt


def _on_its_way() -> bool:
    """Return True where the code under way is the clean-up of an interrupt, which must not be interrupted in turn."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
