"""Blocks in chunks: the same logits, KV, tokens and bytes as whole ones, at any length and for every strategy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from apb.compress import COMPRESSORS
from apb.engine import Engine
from apb.strategies import STRATEGIES, strategy
from tests.tiny import make_prompt, tiny_engine, tiny_llama

CHUNKS = (1, 7, 64, 5000)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@functools.cache
def engine(name: str, hosts: int, select: str | None, dtype: torch.dtype, chunk: int | None) -> Engine:
    made = tiny_engine(tiny_llama(dtype), strategy(name), hosts, select)
    made.setup = dataclasses.replace(made.setup, chunk_tokens=chunk)
    return made


def prefilled(made: Engine, lengths: tuple[int, int, int]) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Return the handle, its logits and all hosts' KV, layer by layer."""
    handle = made.prefill(make_prompt(*lengths))
    hosts = [made.cluster.host(r)._caches[handle.id].context for r in range(made.cluster.hosts)]
    return handle, made.logits(handle), [torch.stack([kv.k_BKTD, kv.v_BKTD]) for host in hosts for kv in host]


def check(
    name: str,
    hosts: int,
    select: str | None = None,
    lengths: tuple[int, int, int] = (253, 5, 6),
    dtype: torch.dtype = torch.float64,
    chunks: tuple[int, ...] = CHUNKS,
) -> None:
    whole = engine(name, hosts, select, dtype, None)
    handle, logits, kept = prefilled(whole, lengths)
    scale = logits.abs().max()
    tokens = whole.generate(handle, max_new_tokens=4).token_ids
    for chunk in chunks:
        made = engine(name, hosts, select, dtype, chunk)
        other, got, theirs = prefilled(made, lengths)
        assert (got - logits).abs().max() <= TOLERANCE[dtype] * scale, chunk
        for mine, their in zip(kept, theirs, strict=True):
            assert (mine - their).abs().max() <= TOLERANCE[dtype] * mine.abs().max(), chunk
        assert other.metrics["bytes_by_kind"] == handle.metrics["bytes_by_kind"]
        assert made.generate(other, max_new_tokens=4).token_ids == tokens, chunk


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_the_same_in_chunks(name: str, hosts: int, dtype: torch.dtype) -> None:
    if name == "full" and hosts > 1:
        return
    check(name, hosts, "query" if strategy(name).takes_compressor else None, dtype=dtype)


@pytest.mark.parametrize("lengths, hosts", [((1, 0, 1), 1), ((3, 1, 1), 3), ((9, 5, 6), 8), ((30, 2, 40), 3)])
@pytest.mark.parametrize("name", ["apb", "star", "ring"])
def test_short_contexts_are_the_same_in_chunks(name: str, lengths: tuple[int, int, int], hosts: int) -> None:
    check(name, hosts, "query" if name == "apb" else None, lengths, chunks=(1, 2, 7))
