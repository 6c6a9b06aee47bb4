"""Ray actors as a cluster: the virtual hosts' results, and what becomes of dead hosts and dead drivers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from apb.clusters.outcome import Outcome, attempt, intact, values
from apb.engine.engine import Engine
from apb.plan.bytes import bytes_by_kind
from apb.plan.plan import PrefillPlan
from burst.errors import HostFailure, UserError
from launch.hosts.meeting import LOOPBACK, open_store
from launch.ray.cluster import RayCluster
from launch.ray.places import neighbours
from tests.support.ray_driver import LONG
from tests.support.tiny import random_ids, saved_llama

ROOT = Path(__file__).parents[2]
HOSTS = 3
CONTEXT, QUESTION = list(random_ids(1001, 4)), list(random_ids(9, 5))
pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer on disk."""
    return saved_llama(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="session")
def engine(model: str) -> Iterator[Engine]:
    """Ray hosts for the whole session."""
    with Engine.launch(model, hosts=HOSTS, cluster="ray", timeout_s=60.0) as started:
        yield started


@pytest.fixture
def cluster(engine: Engine) -> RayCluster:
    """The session's cluster."""
    assert isinstance(engine.cluster, RayCluster)
    return engine.cluster


def refuse(which: tuple[int, ...]) -> list[Any]:
    """One call for every host that does nothing, or raises the user's mistake."""

    def mistake() -> None:
        raise UserError("no such thing", given=1, allowed=2, remedy="Give 2.")

    return [(mistake if rank in which else (lambda: None),) for rank in range(HOSTS)]


def test_same_as_virtual(engine: Engine, model: str) -> None:
    tokens, logits, kinds = [], [], []
    with Engine.launch(model, hosts=HOSTS, cluster="virtual") as virtual:
        for one in (virtual, engine):
            handle = one.prefill(CONTEXT, QUESTION, chat=False)
            logits.append(one.logits(handle))
            result = one.generate(handle, max_new_tokens=8)
            tokens.append(result.token_ids)
            kinds.append(result.metrics["bytes_by_kind"])
            plan: PrefillPlan = one.setup.plan(handle.prompt)
    assert tokens[0] == tokens[1]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert torch.isfinite(logits[1]).all()
    count = len(tokens[1])
    booked = bytes_by_kind(plan, len(handle.prompt.question.query_ids), decided=count, forwarded=count - 1)  # type: ignore[union-attr]
    assert kinds[0] == kinds[1] == booked


@pytest.mark.parametrize("name", ["ring", "burst", "allgather", "ulysses", "usp"])
def test_exact_strategies_answer_as_full_does(engine: Engine, model: str, name: str) -> None:
    exact = Engine(engine.setup.using(name), engine.cluster)
    handle = exact.prefill(CONTEXT, QUESTION, chat=False)
    with Engine.launch(model, strategy="full", cluster="virtual") as full:
        want = full.prefill(CONTEXT, QUESTION, chat=False)
        assert (exact.logits(handle) - full.logits(want)).abs().max() < 1e-4
        tokens = full.generate(want, max_new_tokens=8).token_ids
    result = exact.generate(handle, max_new_tokens=8)
    plan, count = exact.setup.plan(handle.prompt), len(tokens)
    assert result.token_ids == tokens
    assert result.metrics["bytes_by_kind"] == bytes_by_kind(plan, len(QUESTION), decided=count, forwarded=count - 1)


def test_events_come_in_order_and_in_the_callers_thread(engine: Engine) -> None:
    said: list[Any] = []

    def on_layer(done: int, total: int) -> None:
        said.append((done, total, threading.current_thread() is threading.main_thread()))

    handle = engine.prefill(CONTEXT, QUESTION, chat=False, on_layer=on_layer)
    assert said == [(layer, 3, True) for layer in (1, 2, 3)]
    pieces: list[str] = []
    result = engine.generate(handle, max_new_tokens=20, on_token=pieces.append)
    assert "".join(pieces) == result.text


def test_events_arrive_while_the_call_runs(engine: Engine) -> None:
    heard: list[float] = []
    engine.prefill(list(LONG), QUESTION, chat=False, on_layer=lambda *_: heard.append(time.monotonic()))
    assert heard[1] > heard[0] and time.monotonic() - heard[0] > 0.1


def test_a_mistake_that_all_hosts_meet_leaves_their_caches(engine: Engine, cluster: RayCluster) -> None:
    handle = engine.prefill(CONTEXT, QUESTION, chat=False)
    with pytest.raises(UserError, match="Give 2"):
        cluster.call("_measured", refuse((0, 1, 2)))
    assert engine.generate(handle, max_new_tokens=2).token_ids


def test_a_host_that_is_killed(engine: Engine, cluster: RayCluster) -> None:
    before = engine.prefill(CONTEXT, QUESTION, chat=False)
    want, epoch, victim = engine.logits(before), cluster.epoch, 1
    pids = cluster.pids

    def kill(done: int, total: int) -> None:
        if done == 1:
            os.kill(pids[victim], signal.SIGKILL)

    with pytest.raises(HostFailure) as failure:
        engine.prefill(list(LONG), QUESTION, chat=False, on_layer=kill)
    assert failure.value.rank == victim
    assert "layer" in failure.value.step
    assert failure.value.peer != victim
    assert cluster.epoch == epoch + 1
    with pytest.raises(UserError, match="died"):
        engine.generate(before)
    assert torch.equal(engine.logits(engine.prefill(CONTEXT, QUESTION, chat=False)), want)
    assert gone(pids)


def test_too_many_hosts(cluster: RayCluster, caplog: pytest.LogCaptureFixture) -> None:
    import ray

    have = int(ray.cluster_resources()["CPU"])
    with pytest.raises(UserError, match=f"has {have} CPUs .* {have + 1} hosts asked") as error:
        RayCluster(cluster._spec, have + 1, startup_timeout_s=2.0)
    (waiting,) = [record.getMessage() for record in caplog.records if record.name == "launch.ray.places"]
    assert f"has {have} CPUs" in waiting and f"{have + 1} hosts asked" in waiting and "up to 2 s" in waiting
    assert "cluster.hosts" in error.value.remedy
    assert ray.is_initialized()  # it belongs to the other cluster


def test_join_by_address_and_dead_drivers(engine: Engine, model: str) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    with Driver(model, "answer", address) as joined, Driver(model, "linger") as killed:
        pids = joined.hear("pids")
        got = joined.hear("token_ids")
        assert len(got) == 6
        joined.hear("closed")
        pids = killed.hear("pids")
        killed.hear("layer")
        family = [p.pid for p in psutil.Process(killed.pid).children(recursive=True)]
        assert set(pids) <= set(family)
        os.kill(killed.pid, signal.SIGKILL)
        assert gone(family)
    assert engine.prefill(CONTEXT, QUESTION, chat=False).exact is False  # the session's own hosts are still there


def test_ctrl_c_leaves_no_process(model: str) -> None:
    with Driver(model, "linger") as driver:
        driver.hear("pids")
        driver.hear("layer")
        family = [p.pid for p in psutil.Process(driver.pid).children(recursive=True)]
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait() != 0
        assert gone(family)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.ray.session import load_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install ray.*cluster=virtual"):
        load_ray()


def test_no_ray_at_the_address(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from launch.ray import session as ray_session

    def refuse_to_join(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse_to_join)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(UserError, match="ray start --head"):
        ray_session.open_session("auto", 2)


@pytest.mark.parametrize("address", ["nonsense", "ray://here:1", "127.0.0.1:99999", "{closed}"])
def test_an_address_where_nobody_is(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    import ray

    from launch.ray import session as ray_session

    with socket.create_server((LOOPBACK, 0)) as server:
        closed = f"{LOOPBACK}:{server.getsockname()[1]}"
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked, which waits for minutes"))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(UserError, match=r"cannot join a Ray cluster: .*(HOST:PORT|nobody answers)"):
        ray_session.open_session(address.format(closed=closed), 2)


def test_a_driver_that_dies_while_ray_starts(tmp_path: Path) -> None:
    """It could name no process to its watch, which finds them by the folder that they use."""
    script = f"""
import subprocess, sys, time
from pathlib import Path
from launch.ray.watch import Watch
Watch(Path({str(tmp_path)!r}))
log = open({str(tmp_path / "agent.out")!r}, "w")
for words in ([{str(tmp_path)!r}], []):
    code = "import time; print(flush=True); time.sleep(60)"
    pipe = subprocess.PIPE if words else log
    started = subprocess.Popen([sys.executable, "-c", code, *words], stdout=pipe)
    print(started.pid, flush=True)
    if words:
        started.stdout.readline()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pids = [int(driver.stdout.readline()) for _ in range(2)]
        driver.kill()
    assert gone(pids)
    assert settled(lambda: not tmp_path.exists())


def test_ports_are_never_busy() -> None:
    stores = [open_store(LOOPBACK, 1, 5.0) for _ in range(2)]
    first, second = (store.port for store in stores)
    assert first != second


def test_ranks_on_one_node_are_neighbours() -> None:
    spread = ["a", "b", "c", "a", "b", "a"]
    assert neighbours(spread, first="b") == ((1, 4, 0, 3, 5, 2), (0, 0, 1, 1, 1, 2))
    assert neighbours(["x"] * 3, first="elsewhere") == ((0, 1, 2), (0, 0, 0))


def test_what_a_call_comes_to() -> None:
    class Odd(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("not to be pickled")

    def fail(error: Exception) -> Callable[[], None]:
        def run() -> None:
            raise error

        return run

    failure = attempt(fail(HostFailure("stopped", rank=0, step="s", peer=1)))
    bug = attempt(fail(Odd("what happened")))
    mistake = attempt(fail(UserError("m", given=1, allowed=2, remedy="r")))
    fine = attempt(lambda: 7)
    assert values({1: fine, 0: Outcome(3)}) == [3, 7]
    with pytest.raises(RuntimeError, match="Odd: what happened"):
        values({0: failure, 1: bug})
    with pytest.raises(UserError):
        values({0: failure, 1: bug, 2: mistake})
    assert intact({0: mistake, 1: mistake}, 2) and intact({0: fine, 1: fine}, 2)
    assert not any(intact({0: fine, 1: other}, 2) for other in (failure, bug, mistake))
    assert not intact({0: fine}, 2)


class Driver:
    """tests.support.ray_driver in a process group of its own."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_driver", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def hear(self, key: str) -> Any:
        """Return the next thing it says under ``key``."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)  # nothing else may stand on stdout
            if key in said:
                return said[key]
        raise AssertionError(f"ended without saying {key}")

    def wait(self) -> int:
        """Wait for its end."""
        return self._process.wait(60)


def gone(pids: tuple[int, ...] | list[int]) -> bool:
    """Whether all these processes end in time."""
    return settled(lambda: not any(alive(pid) for pid in pids))


def settled(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether something comes about in time."""
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
