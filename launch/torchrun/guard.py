"""Stands beside rank 0 and tells of its end when it cannot do so itself.

That is when it is killed, stopped, stands still, or waits for a rank that is lost. Runs in a process of its own that
shares rank 0's output; a line of JSON on its input is a beat of rank 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from launch.hosts.vigil import Vigil, beat_s

LOOK_S = 0.5
SPARE_S = 2.5  # without a beat, after which the guard prepares for what it may have to tell
STEP = "running the command"
END_S = 5.0  # for the guard to go once it is told that all is done


class Guard:
    """Rank 0's end; ``beat`` says at every beat how long rank 0 may be silent, and what else the guard should know."""

    def __init__(self, beat: Callable[[], dict[str, Any]]) -> None:
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import launch.torchrun.guard as g; "
        self._process = subprocess.Popen(
            [sys.executable, "-c", code + "g.main(int(sys.argv[2]))", json.dumps(sys.path), str(os.getpid())],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C and torchrun's signals are for the ranks
        )
        self._beat, self._over = beat, threading.Event()
        threading.Thread(target=self._beating, name="guard", daemon=True).start()

    def dismiss(self) -> None:
        """Say that this process has told of its end itself."""
        self._over.set()
        self._tell({"done": True})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)

    def _beating(self) -> None:
        while not self._over.is_set():
            now = self._beat()
            self._tell(now)
            self._over.wait(beat_s(now["timeout_s"]))

    def _tell(self, words: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone: nobody guards
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()


def main(leader: int) -> None:
    """Listen until rank 0, the process ``leader``, is done, gone, silent, still or stuck; tell of all but the first,
    and end what is left."""
    heard = time.monotonic()
    vigil: Vigil | None = None
    pids: list[int] = []
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], LOOK_S)
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                return _tell("its process ended: killed, out of memory, or crashed", 0, STEP, pids)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "done" in said:
                    return
                vigil = vigil or Vigil((0,), said["timeout_s"])
                vigil.timeout_s, pids = said["timeout_s"], said["pids"]
                vigil.heard(0, said["idle_s"])
                heard = time.monotonic()
                if "lost" in said:
                    return _tell(pids=[leader, *pids], **said["lost"])
        lost = vigil.lost((0,)) if vigil is not None else {}
        if time.monotonic() > heard + SPARE_S:
            import launch.terminal.output  # noqa: F401 - takes seconds on a busy machine
        if lost:
            return _tell(lost[0], 0, STEP, [leader, *pids])


def _tell(message: str, rank: int, step: str, pids: list[int]) -> None:
    from burst.errors import HostFailure
    from launch.terminal.output import told

    told(HostFailure(message, rank=rank, step=step))
    sys.stdout.flush()
    for pid in pids:  # a process that is stopped would keep torchrun waiting
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
