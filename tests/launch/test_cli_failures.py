"""Failures that are nobody's mistake, interrupts, and what libraries print."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import Any

import pytest

from burst.errors import HostFailure
from launch.terminal.interrupt import interruptible, keeping_handlers
from tests.support.command import Seen

pytest_plugins = ("tests.support.command",)


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (HostFailure("it died", rank=2, step="layer 3", peer=1), 1, "HostFailure"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_failures(ask: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, kind: str) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("launch.verbs.prefill.ask.Engine.prefill", fail)
    ran = ask()
    assert ran.code == code and ran.document["error"]["type"] == kind
    assert set(ran.document["error"]) == {"type", "given", "allowed", "remedy", "message"}
    assert "Traceback" not in ran.err
    if code == 1:
        assert "Traceback" in ask("--verbose").err


def test_a_swallowed_interrupt_comes_again() -> None:
    with interruptible(), pytest.raises(KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        time.sleep(10)


def test_an_interrupt_leaves_its_own_clean_up_alone() -> None:
    cleaned = False
    with interruptible(), pytest.raises(KeyboardInterrupt):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(1.2)
            cleaned = True
    assert cleaned


def test_code_that_replaces_signal_handlers() -> None:
    def others(signum: int, frame: object) -> None:
        raise AssertionError("the library's own")

    with interruptible(), pytest.raises(KeyboardInterrupt), keeping_handlers():
        signal.signal(signal.SIGTERM, others)
        signal.raise_signal(signal.SIGTERM)


def test_what_libraries_print_does_not_reach_stdout(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(kind: Any, config: Any) -> None:
        print("hello")  # noqa: T201
        raise Seen

    monkeypatch.setattr("launch.verbs.prefill.ask.settle", settle)
    ran = ask()
    assert ran.code == 1 and len(ran.out.splitlines()) == 1 and "hello" in ran.err
