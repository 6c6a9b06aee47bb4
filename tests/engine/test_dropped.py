"""Handles that nobody refers to any more: their caches leave the hosts with the next call."""

from __future__ import annotations

import gc

from apb.clusters.virtual import VirtualCluster
from apb.engine.engine import Engine
from tests.support.asking import engine, ids, prompt


def held(e: Engine) -> list[int]:
    """How many caches each host holds."""
    assert isinstance(e.cluster, VirtualCluster)
    return [len(host._caches) for host in e.cluster._hosts]


def test_dropped_handles_are_released_with_the_next_call() -> None:
    e = engine()
    for _ in range(10):
        e.prefill(prompt(), chat=False)
        gc.collect()
        assert set(held(e)) == {1}
    kept = e.prefill(prompt(), chat=False)
    before = kept.logits()
    assert set(held(e)) == {1}
    for _ in range(5):
        kept.fork(query=list(ids(5, 11)))
        kept.fork()
        kept.gather(rank=1)
    assert (kept.logits() == before).all()
    assert set(held(e)) == {1}


def test_a_cache_that_moved_is_released_once_nobody_refers_to_it() -> None:
    e = engine()
    handle = e.prefill(prompt(), chat=False)
    e.generate(handle, max_new_tokens=2, placement="gathered")
    assert e.generate(handle, max_new_tokens=2).token_ids
    assert set(held(e)) == {1}
    del handle
    kept = e.prefill(prompt(), chat=False)
    assert kept.logits() is not None
    assert set(held(e)) == {1}


def test_engines_on_one_cluster_do_not_release_each_others_caches() -> None:
    e = engine()
    other = Engine(e.setup, e.cluster)
    kept = e.prefill(prompt(), chat=False)
    other.prefill(prompt(), chat=False)
    assert set(held(e)) == {2}
    del other
    gc.collect()
    assert kept.logits() is not None and set(held(e)) == {1}


def test_a_released_handle_is_not_released_again() -> None:
    e = engine()
    handle = e.prefill(prompt(), chat=False)
    handle.release()
    del handle
    assert not e._calls.names.dropped and set(held(e)) == {0}
    e.close()
