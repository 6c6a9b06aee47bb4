"""Stands beside a driver that started Ray and clears up when the driver is gone, however it went.

Ray's own processes end with their driver, all but two agents, which first try for a minute to report it; and
its folder stays. Run as a script: the folder is its argument; process ids come on stdin till the driver ends.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

CLEAR_S = 10.0  # clearing up takes milliseconds; a driver that closes waits no longer for it


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
    processes: list[psutil.Process] = []
    for line in sys.stdin:
        with contextlib.suppress(psutil.Error):
            processes.append(psutil.Process(int(line)))
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()  # psutil makes sure that the id still is this process's
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
