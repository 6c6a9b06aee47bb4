"""Closed, full and broken streams, disks that fill, and sweeps without bounds: an exit code and one document."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.terminal.output import failure, one_line

pytest_plugins = ("tests.support.command",)
ROOT = Path(__file__).parents[2]
FULL = OSError(errno.ENOSPC, "No space left on device")


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise FULL


@pytest.mark.parametrize(
    ("redirect", "code"), [(">&-", 1), (">/dev/full", 1), ("2>&-", 0), ("2>/dev/full", 0), ("<&-", 0)]
)
def test_streams_that_are_closed_or_full(redirect: str, code: int, tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m launch.cli --version {redirect}'
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(["sh", "-c", command], capture_output=True, cwd=tmp_path, env=env, timeout=60)
    assert done.returncode == code and b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert done.stdout.startswith(b"apb ") == (code == 0)
    assert (b"could not be written" in done.stderr) == (code == 1)


def test_a_document_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["ask", "strategy=abp"]) == 2  # a mistake stays one
    assert main(["--help"]) == 1
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--help"]) == 1


def test_what_people_read_can_be_lost(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Full(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        ran = ask("strategy=full", "decode.max_new_tokens=1")
        assert ran.code == 0 and len(ran.document["token_ids"]) == 1


def test_standard_input_that_is_closed(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    ask("-d", "-").refused("standard input cannot be read", "closed")


@pytest.mark.parametrize("name", ["result.json", "config.yaml", "apb.log"])
def test_a_disk_that_fills_loses_no_answer(
    ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    write, opened = Path.write_text, Path.open

    def full(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == name:
            raise FULL
        return write(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full() if self.name == name else opened(self, *a, **k))
    ran = ask("strategy=full", "decode.max_new_tokens=1", f"out={tmp_path / 'out'}")
    assert ran.code == 2 and "No space left" in ran.document["error"]["message"]
    assert ("token_ids" in ran.document) == (name != "config.yaml")


def test_errors_of_files_are_no_bugs(ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/some/where")

    monkeypatch.setattr("launch.verbs.prefill.ask.Engine.launch", fail)
    ask().refused("/some/where cannot be read or written", "permissions")
    ask(f"model={'a' * 300}").refused("File name too long")
    ask(f"model={'a/' * 3000}").refused("no model has such a name")
    ask(f"out={'a' * 300}").refused("folder for results")
    assert failure(OSError("of no kind"), _Nothing(), False)[0] == 1
    assert failure(MemoryError(), _Nothing(), False)[0] == 2


def test_a_document_has_no_infinity() -> None:
    assert one_line({"a": [1.0, float("inf")], "b": {"c": float("nan")}}) == '{"a": [1.0, null], "b": {"c": null}}'


class _Nothing:
    def note(self, text: str, style: str = "") -> None: ...


@pytest.mark.parametrize(
    "words",
    [
        ["cluster.hosts=range(0,10,0)"],
        ["cluster.hosts=range(0,1000000000)"],
        ["cluster.hosts=range(0,1e300,1e-300)"],
        ["cluster.hosts=range(0,1e400)"],
        [f"cluster.hosts=range(0,1{'0' * 400})"],
        ["cluster.hosts=range(5,1)"],
        ["cluster.hosts=range(1,5,-1)"],
        ["cluster.hosts=range(1,1000)", "decode.seed=range(1,1000)", "decode.top_k=range(1,1000)"],
        ["decode.top_p=range(0,1,0.0000001)"],
        ["cluster.hosts=shuffle(range(0,1000000000))"],
        ["cluster.hosts=sort(range(0,1000000000))"],
        ["cluster.hosts=interval(1,2)"],
        ["strategy=glob(nothing*)"],
        [f"cluster.hosts={'[' * 3000}"],
        [f"cluster.hosts={','.join(map(str, range(3000)))}"],
    ],
)
def test_sweeps_without_bounds(apb: Any, words: list[str]) -> None:
    error = apb("plan", "-m", *words).refused()
    assert any(part in error["message"] for part in ("cannot be listed", "256 runs", "too long", "cannot be read"))


def test_the_number_of_runs_is_bounded_not_their_names(apb: Any) -> None:
    document = json.loads(json.dumps(apb("plan", "-m", "model=/a,/b", "strategy=glob(u*)").document))
    chosen = [run["overrides"] for run in document["runs"]]
    assert chosen == [[f"model=/{m}", f"strategy={s}"] for m in "ab" for s in ("ulysses", "usp")]
