"""Stands beside a driver that started Ray and clears up when the driver is gone, however it went.

Ray's own processes end with their driver, all but two agents, which first try for a minute to report it; and
its folder stays. Run as a script: the folder is its argument; process ids come on stdin till the driver ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

CLEAR_S = 10.0  # clearing up takes milliseconds; a driver that closes waits no longer for it
PAUSE_S = 0.5


class Watch:
    """The driver's end."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        # A session of its own: Ctrl-C is for the driver. Isolated: neighbours of this file shadow no module.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def tell(self) -> None:
        """Name Ray's processes: those that were told the folder, and their own, which show other names."""
        family: dict[int, None] = {}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.pid != self._process.pid and any(self._folder in word for word in process.cmdline()):
                    family |= dict.fromkeys([process.pid, *(p.pid for p in process.children(recursive=True))])
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write("".join(f"{pid}\n" for pid in family))
            self._process.stdin.flush()

    def close(self) -> None:
        """Have everything cleared up now."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=CLEAR_S)


def main(folder: str) -> None:
    """Read process ids until the driver is gone, then end those that are left and remove the folder."""
    driver = os.getppid()
    processes: list[psutil.Process] = []
    for line in sys.stdin:
        with contextlib.suppress(psutil.Error):
            processes.append(psutil.Process(int(line)))
    _kill(processes)
    if not processes:  # it went while Ray was starting, before it could name any
        while found := [p for p in psutil.process_iter() if p.pid not in (driver, os.getpid()) and _uses(p, folder)]:
            _kill(found)
            time.sleep(PAUSE_S)  # for those that were just being born
    shutil.rmtree(folder, ignore_errors=True)


def _uses(process: psutil.Process, folder: str) -> bool:
    """Return True for a process that was told the folder or, under whatever name it shows, writes its log there."""
    try:
        return any(folder in word for word in process.cmdline()) or any(
            file.path.startswith(folder) for file in process.open_files()
        )
    except psutil.Error:
        return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()  # psutil makes sure that the id still is this process's


if __name__ == "__main__":
    main(sys.argv[1])
