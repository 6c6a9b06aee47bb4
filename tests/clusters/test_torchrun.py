"""torchrun's processes as a cluster, started by the real torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from apb.engine.engine import Engine
from burst.errors import UserError
from launch.torchrun.cluster import TorchrunCluster
from launch.torchrun.ranks import _end_after_parent
from launch.torchrun.start import arguments, lead
from tests.support import torchrun_driver
from tests.support.tiny import saved_llama

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a module in two processes and return what came of it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer on disk."""
    return saved_llama(tmp_path_factory.mktemp("torchrun"))


@pytest.fixture(scope="module")
def found(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver found on rank 0."""
    out = tmp_path_factory.mktemp("out") / "found.json"
    done = torchrun("tests.support.torchrun_driver", model, str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"  # the other rank says nothing
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def expected(model: str, **options: Any) -> dict[str, Any]:
    """What virtual hosts answer."""
    with Engine.launch(model, cluster="virtual", **options) as engine:
        return torchrun_driver.answer(engine)


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Compare two answers."""
    assert (torch.tensor(got["logits"]) - torch.tensor(want["logits"])).abs().max() < 1e-4
    for key in ("token_ids", "bytes_by_kind", "layers"):
        assert got[key] == want[key], key


def test_same_as_virtual(model: str, found: dict[str, Any]) -> None:
    want = expected(model, hosts=torchrun_driver.HOSTS)
    same(found["all"], want)
    same(found["again"], want)  # a second cluster in the same processes, with another deadline


def test_exact_strategies_answer_as_full_does(model: str, found: dict[str, Any]) -> None:
    full = expected(model, hosts=1, strategy="full")
    for name in torchrun_driver.EXACT:
        same(found[name], expected(model, hosts=torchrun_driver.HOSTS, strategy=name))
        assert found[name]["token_ids"] == full["token_ids"]
        assert (torch.tensor(found[name]["logits"]) - torch.tensor(full["logits"])).abs().max() < 1e-4


def test_one_host_while_the_others_idle(model: str, found: dict[str, Any]) -> None:
    same(found["alone"], expected(model, hosts=1, strategy="full"))


@pytest.mark.parametrize("victim", range(torchrun_driver.HOSTS))
def test_a_failing_host_ends_the_call_and_not_the_processes(found: dict[str, Any], victim: int) -> None:
    failed = found[f"failing {victim}"]
    assert failed["type"] == "IndexError"  # what went wrong, not what it did to the peer
    assert failed["after_s"] < 20  # its peer did not wait for the deadline of 60 s
    same(found[f"after {victim}"], found["all"])
    assert found["epoch"] == torchrun_driver.HOSTS


def test_a_second_engine_on_the_same_processes(found: dict[str, Any]) -> None:
    assert "Close the first engine" in found["second"]


def test_another_number_of_hosts(found: dict[str, Any]) -> None:
    assert "--nproc-per-node=3" in found["too many"]


def test_not_started_by_torchrun(model: str) -> None:
    with pytest.raises(UserError, match="torchrun --standalone --nproc-per-node"):
        Engine.launch(model, hosts=2, cluster="torchrun")
    assert TorchrunCluster.name == "torchrun"


def test_a_busy_port(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        assert lead(lambda: pytest.fail("it ran")) == 2
    found = capsys.readouterr()
    assert f"MASTER_PORT={port}" in json.loads(found.out)["error"]["given"] and "cannot meet" in found.err


def test_ranks_end_after_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([7, 7, 1])
    sent: list[int] = []
    monkeypatch.setattr("launch.torchrun.ranks.SLICE_S", 0.0)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    _end_after_parent(7)
    assert sent == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        ([], ["ask", "cluster=torchrun"]),
        (["ask", "-q", "cluster=what?"], ["ask", "-q", "cluster=what?", "cluster=torchrun"]),
        (["plan", "cluster=virtual"], ["plan", "cluster=virtual"]),
        (["-d", "plan", "strategy=star"], ["ask", "-d", "plan", "strategy=star", "cluster=torchrun"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_arguments(given: list[str], completed: list[str]) -> None:
    assert arguments(given) == completed


def test_command_line(model: str, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("the king of the hill sees the sea and the stars. " * 20)
    words = ("-d", str(document), "-q", "what?", f"model={model}", "compare=true", "decode.max_new_tokens=4")
    done = torchrun("launch.torchrun", *words)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["cluster"], answer["hosts"], answer["compare"]["hosts"]) == ("torchrun", 2, 1)


def test_a_mistake_on_the_command_line(model: str) -> None:
    done = torchrun("launch.torchrun", "cluster.hosts=3", f"model={model}", "-q", "what?")
    assert done.returncode != 0
    assert json.loads(done.stdout.splitlines()[-1])["error"]["given"] == "cluster.hosts=3"
    others, _, first = done.stderr.partition("Root Cause")
    assert "exitcode  : 2" in first and "rank      : 0" in first
    assert "exitcode  : 1" in others and "rank      : 1" in others  # a machine without rank 0 fails, too
