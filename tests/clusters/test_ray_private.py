"""Who can reach a Ray that was started here, and hosts of it that stop."""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from apb.engine.engine import Engine
from burst.errors import HostFailure
from launch.ray.cluster import RayCluster
from tests.support.ray_driver import LONG
from tests.support.tiny import random_ids, saved_llama

CONTEXT, QUESTION = list(random_ids(401, 4)), list(random_ids(9, 5))
TIMEOUT_S = 3.0  # the driver's own; between the hosts it is a minute
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def before() -> set[str]:
    """Listeners of this process, which runs other tests as well, and of its children before Ray starts."""
    return beyond_loopback(family())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, before: set[str]) -> Iterator[Engine]:
    """Two hosts that never wait for each other in a prefill."""
    model = saved_llama(tmp_path_factory.mktemp("ray"))
    with Engine.launch(model, hosts=2, strategy="star", cluster="ray", timeout_s=60.0) as started:
        yield started


@pytest.fixture
def impatient(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    """The cluster, all its hosts there, with a driver that does not wait long."""
    assert isinstance(engine.cluster, RayCluster)
    engine.prefill(CONTEXT, QUESTION, chat=False)
    monkeypatch.setattr(engine.cluster, "_spec", dataclasses.replace(engine.cluster._spec, timeout_s=TIMEOUT_S))
    return engine.cluster


def beyond_loopback(processes: list[psutil.Process]) -> set[str]:
    """Addresses beyond this machine's loopback at which processes listen."""
    found = set()
    for process in processes:
        for at in process.net_connections("inet"):
            address = ipaddress.ip_address(at.laddr.ip) if at.status == psutil.CONN_LISTEN else None
            mapped = getattr(address, "ipv4_mapped", None) or address
            if mapped is not None and not mapped.is_loopback:
                found.add(f"{process.name()} {at.laddr}")
    return found


def family() -> list[psutil.Process]:
    """This process and all its children."""
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def test_nothing_listens_beyond_loopback(engine: Engine, before: set[str]) -> None:
    engine.prefill(CONTEXT, QUESTION, chat=False)
    assert set(engine.cluster.pids) <= {p.pid for p in family()}  # type: ignore[attr-defined]
    assert beyond_loopback(family()) <= before


def test_rays_folder_and_token_are_the_users_alone(engine: Engine) -> None:
    import ray

    folder = Path(ray._private.worker._global_node.temp_dir)
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == folder.parent  # what Ray makes inside is open to everyone who gets there
    assert [oct(p.stat().st_mode & 0o777) for p in (folder.parent, token)] == ["0o700", "0o600"]


@pytest.mark.parametrize("mode, token", [("disabled", None), ("token", "0" * 64)])
def test_an_outsider_without_the_token(engine: Engine, tmp_path: Path, mode: str, token: str | None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    code = f"""
import ray
from ray._raylet import GcsClient
try:
    print("in", GcsClient(address={address!r}).get_all_job_info())
except Exception as error:
    print("out", type(error).__name__, error)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": mode} | ({"RAY_AUTH_TOKEN": token} if token else {})
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.startswith("out AuthenticationError"), ran.stdout + ran.stderr


def test_hosts_that_stop_while_nobody_waits_for_them(engine: Engine, impatient: RayCluster) -> None:
    pids, stopped = impatient.pids, []

    def stop(done: int, total: int) -> None:
        if not stopped:
            stopped.append(time.monotonic())
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)

    with pytest.raises(HostFailure, match=r"not answered for \d+ s.*so are hosts \[1\]") as failure:
        engine.prefill(list(LONG), QUESTION, chat=False, on_layer=stop)
    assert time.monotonic() - stopped[0] < TIMEOUT_S + 15
    assert failure.value.rank == 0 and "layer" in failure.value.step
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_host_that_stands_still(impatient: RayCluster) -> None:
    with pytest.raises(HostFailure, match="its work has stood still") as failure:
        impatient.call("_measured", [(functools.partial(time.sleep, 600 * rank),) for rank in range(2)])
    assert failure.value.rank == 1
