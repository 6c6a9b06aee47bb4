"""torchrun's processes: who can reach them, and what is told when one of them stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.clusters.test_ray_private import beyond_loopback
from tests.support.tiny import saved_llama

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 8.0
# Without a store in torchrun's own process, which listens everywhere.
PRIVATE = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer on disk."""
    return saved_llama(tmp_path_factory.mktemp("torchrun"))


class Run:
    """Two ranks under way, somewhere in a prefill."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process
        end = time.monotonic() + 120
        while not (folder / "layer").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert (folder / "layer").exists(), process.communicate()
        self.pids = [int((folder / f"pid-{rank}").read_text()) for rank in range(2)]

    def told(self, within_s: float) -> dict[str, Any]:
        """Return the error on the last line of standard output, once all is over."""
        out, err = self.process.communicate(timeout=within_s)
        assert self.process.returncode == 1, err
        error: dict[str, Any] = json.loads(out.splitlines()[-1])["error"]
        assert not any(psutil.pid_exists(pid) for pid in self.pids)
        return error


@contextmanager
def running(model: str, folder: Path) -> Iterator[Run]:
    """Start the program."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    words = ["-m", "tests.support.torchrun_stops", model, str(folder), str(TIMEOUT_S)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *PRIVATE, "--nproc-per-node=2", *words],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Run(folder, process)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.communicate()


def test_nothing_listens_beyond_loopback_and_one_that_stops_is_told_of(model: str, tmp_path: Path) -> None:
    with running(model, tmp_path) as run:
        agent = psutil.Process(run.process.pid)
        family = [agent, *agent.children(recursive=True)]
        assert set(run.pids) <= {p.pid for p in family}
        assert beyond_loopback(family) == set()
        os.kill(run.pids[1], signal.SIGSTOP)
        error = run.told(TIMEOUT_S + 40)
    assert error["type"] == "HostFailure" and error["given"].startswith("host 1")
    assert "has not answered for" in error["message"]
