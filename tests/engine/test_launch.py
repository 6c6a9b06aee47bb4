"""Launching: what an engine takes from its launcher, and options that there are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from apb.clusters import launcher
from apb.engine.engine import Engine
from burst.errors import UserError
from tests.support.tiny import saved_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer on disk."""
    return saved_llama(tmp_path_factory.mktemp("launch"))


@pytest.mark.parametrize(("given", "hosts", "threads"), [({}, 3, 2), ({"hosts": 2, "threads": 4}, 2, 4)])
def test_hosts_and_threads_left_open_are_the_launchers(
    model: str, given: dict[str, int], hosts: int, threads: int
) -> None:
    with Engine.launch(model, cluster=launcher("virtual", hosts=3, threads=2), **given) as engine:
        assert (engine.setup.hosts, engine.setup.spec.threads) == (hosts, threads)


@pytest.mark.parametrize("cluster", ["virtual", launcher("virtual")])
def test_an_option_that_the_cluster_does_not_have(cluster: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no option 'address'"):
        Engine.launch(str(tmp_path), cluster=cluster, address="here")  # type: ignore[arg-type]
