"""The guard beside rank 0: it tells of an end that rank 0 cannot tell of, and of no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1.0
RANK_0 = """
import json, sys, time
from launch.torchrun.guard import Guard
known = json.loads(sys.argv[1])
guard = Guard(lambda: known)
print("ready", flush=True)
time.sleep(known["runs_s"])
print("told", flush=True)
guard.dismiss()
"""


def rank_0(runs_s: float = 60.0, **known: Any) -> subprocess.Popen[str]:
    """Start a process that a guard stands beside."""
    words = {"timeout_s": TIMEOUT_S, "idle_s": 0.0, "pids": [], "runs_s": runs_s} | known
    process = subprocess.Popen(
        [sys.executable, "-c", RANK_0, json.dumps(words)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # for its first beat
    return process


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the error that the guard told, once it and rank 0 are gone."""
    out, _ = process.communicate(timeout=60)
    error: dict[str, Any] = json.loads(out.splitlines()[-1])["error"]
    assert process.returncode == -signal.SIGKILL and error["type"] == "HostFailure"
    return error


@pytest.mark.parametrize(
    ("how", "said"), [(signal.SIGSTOP, "has not answered for"), (signal.SIGKILL, "its process ended")]
)
def test_a_rank_0_that_is_stopped_or_killed_and_the_ranks_beside_it(how: signal.Signals, said: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        other.send_signal(signal.SIGSTOP)  # as torchrun would wait for
        process = rank_0(pids=[other.pid])
        os.kill(process.pid, how)
        error = told(process)
        assert other.wait(20) == -signal.SIGKILL
    assert error["given"].startswith("host 0") and said in error["message"]


def test_a_rank_0_that_is_gone_before_its_guard_begins() -> None:
    """Whoever adopted the guard is not ended in rank 0's place."""
    code = (
        "import os, sys, launch.torchrun.guard as g\n"
        "g.os.kill = lambda *about: print('ended', about, file=sys.stderr)\n"
        "g.main(2**22 + 1)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input="", capture_output=True, text=True, timeout=60)
    assert "its process ended" in json.loads(found.stdout)["error"]["message"]
    assert "ended (" not in found.stderr


def test_work_that_stands_still() -> None:
    assert "its work has stood still for 99 s" in told(rank_0(idle_s=99.0))["message"]


def test_a_wait_for_a_rank_that_is_lost() -> None:
    error = told(rank_0(lost={"message": "it is gone", "rank": 3, "step": "prefill"}))
    assert error["given"] == "host 3, step 'prefill'" and "it is gone" in error["message"]


def test_an_end_that_rank_0_has_told_of() -> None:
    process = rank_0(runs_s=2.5 * TIMEOUT_S)
    (guard,) = psutil.Process(process.pid).children()
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("told\n", 0)
    assert not psutil.pid_exists(guard.pid)
