"""Run chat templates in a process of their own and wait for it no longer than it may take."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apb.prompt import sandbox

CPU_S = 1.0  # of a request; templates take milliseconds
CPU_BYTES_PER_S = 10_000_000  # of long conversations, on top
CHARACTERS = 1_000_000  # beside what is said, which templates may write several times (JSON escapes its signs)
TIMES = 8
MEMORY_BYTES = 512_000_000
MEMORY_TIMES = 40
WALL_S = 60.0  # of a request on a machine that has no time for it


class TemplateFailure(Exception):
    """A template that raised, ran for too long or wrote too much: its text says so."""


def fill(template: str, variables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the template's text for every set of variables, which are JSON values; raises TemplateFailure.

    The process that does it is started at the first call, goes on as long as this one, and is started anew after a
    failure that ended it. Threads take turns.
    """
    body = json.dumps({"template": template, "variables": list(variables)}).encode()
    limits = {
        "seconds": CPU_S + len(body) / CPU_BYTES_PER_S,
        "characters": CHARACTERS + TIMES * len(body),
        "bytes": MEMORY_BYTES + MEMORY_TIMES * len(body),
    }
    body = body[:-1] + b", " + json.dumps(limits).encode()[1:]
    try:
        with _lock:
            answer = _process().ask(body)
    except OSError as error:
        raise TemplateFailure(f"no process can be started for it ({error})") from error
    if answer is None:
        raise TemplateFailure(f"it runs for longer than {limits['seconds']:.0f} s, or needs too much memory")
    if "error" in answer:
        raise TemplateFailure(str(answer["error"]))
    texts: list[str] = answer["texts"]
    return texts


class _Renderer:
    """The process, and the pipes to it: it ends when they close, however this process ends."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # a fork of this process must not share the pipes
        folders = {
            str(Path(spec.origin).parents[1])
            for spec in map(importlib.util.find_spec, ("jinja2", "markupsafe"))
            if spec is not None and spec.origin is not None
        }
        # Isolated: nothing of the environment, the working folder or site packages runs in it; no Ctrl-C reaches it.
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(sandbox.__file__), *sorted(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._to, self._from = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._end = weakref.finalize(self, _end, self._child, self.owner)

    @property
    def alive(self) -> bool:
        """True while the process can be asked."""
        return self.owner == os.getpid() and self._child.poll() is None

    def ask(self, body: bytes) -> dict[str, Any] | None:
        """Return the answer to a request; None, and the process is ended, when there is none."""
        answer = None
        try:
            answer = self._exchange(len(body).to_bytes(8, "big") + body, time.monotonic() + WALL_S)
        finally:
            if answer is None:
                self._child.kill()
                self._end()
        return None if answer is None else json.loads(answer)

    def _exchange(self, request: bytes, until: float) -> bytes | None:
        left, got = memoryview(request), bytearray()
        with selectors.DefaultSelector() as ready:
            ready.register(self._to, selectors.EVENT_WRITE)
            ready.register(self._from, selectors.EVENT_READ)
            while (wait := until - time.monotonic()) > 0:
                for key, _ in ready.select(wait):
                    if key.fd == self._from:
                        part = os.read(self._from, 1 << 20)
                        if not part:
                            return None
                        got += part
                    else:
                        try:
                            left = left[os.write(self._to, left[: 1 << 20]) :]
                        except BrokenPipeError:
                            return None
                        if not left:
                            ready.unregister(self._to)
                if len(got) >= 8 and len(got) == 8 + int.from_bytes(got[:8], "big"):
                    return bytes(got[8:])
        return None


_lock = threading.Lock()
_kept: list[_Renderer] = []  # one, or none yet


def _process() -> _Renderer:
    if not _kept or not _kept[0].alive:
        _kept[:] = [_Renderer()]
    return _kept[0]


def _end(child: subprocess.Popen[bytes], owner: int) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if owner != os.getpid():
        return  # a fork's copy: the process is not its child
    try:
        child.wait(timeout=2)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
