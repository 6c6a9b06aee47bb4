"""Every compressor with every strategy that takes one, against the dense twin with the score written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apb.compress import COMPRESSORS, Compressor, compressor
from apb.compress.heads import Head, RetainingHeads, save
from apb.strategies import STRATEGIES, strategy
from burst.errors import UserError
from tests.support import scorers, tiny
from tests.support.tiny import make_prompt, tiny_engine, tiny_llama
from tests.support.twin import Select, twin

TAKING = [name for name in STRATEGIES if strategy(name).takes_compressor and name != "auto"]  # auto is one of them
LENGTHS = (211, 5, 6)
WIDTH, KV_HEADS, LAYERS = 8 * 16, 2, 3  # of the tiny Llama: 4 query and 2 + 2 kv heads of 16


def network(
    seed: int, hidden: int, *, bias: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor], ...]:
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen) / shape[-1] ** 0.5

    return tuple((draw(hidden, WIDTH), draw(hidden) if bias else None, draw(KV_HEADS, hidden)) for _ in range(LAYERS))


def pair(name: str, tmp_path: Path, turn: scorers.Turn) -> tuple[Compressor, Select]:
    """A compressor, and its score written out (or the name by which the twin knows it)."""
    kind, _, rest = name.partition(":")
    if kind == "query" and rest:
        return compressor("query", window=int(rest)), scorers.Query(int(rest))
    if kind == "snapkv":
        return compressor("snapkv"), scorers.SnapKV()
    if kind == "expected":
        return compressor("expected"), scorers.Expected(turn)
    if rest == "published":
        layers = network(1, 24, bias=False)
        state = {f"model.layers.{i}.self_attn.fc1.weight": fc1 for i, (fc1, _, _) in enumerate(layers)}
        state |= {f"model.layers.{i}.self_attn.fc2.weight": fc2 for i, (_, _, fc2) in enumerate(layers)}
        torch.save(state | {"model.norm.weight": torch.ones(3)}, tmp_path / "published.bin")
        return compressor("retaining", heads=str(tmp_path / "published.bin")), scorers.Retaining(layers, None, 5)
    if rest == "ours":
        layers = network(2, 40, bias=True)
        heads = RetainingHeads(tuple(Head(*layer) for layer in layers), 1, "from_end", {})
        save(tmp_path / "ours.safetensors", heads, torch.float32)
        return compressor("retaining", heads=str(tmp_path / "ours.safetensors")), scorers.Retaining(layers, turn)
    return compressor(name), name


NAMES = [
    "query",
    "query:1",
    "snapkv",
    "expected",
    "retaining:published",
    "retaining:ours",
    "norm",
    "recent",
    "random",
]


def test_the_matrix_has_every_compressor() -> None:
    assert {name.partition(":")[0] for name in NAMES} == set(COMPRESSORS)
    assert {"apb", "spava"} <= set(TAKING)


@pytest.mark.parametrize("hosts", [2, 5])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("taking", TAKING)
def test_every_compressor_with_every_strategy_that_takes_one(
    taking: str, name: str, hosts: int, tmp_path: Path
) -> None:
    adapter = tiny_llama(torch.float64)
    turn = tiny.rotation(adapter)
    scorer, written_out = pair(name, tmp_path, turn)
    prompt = make_prompt(*LENGTHS)
    want = twin(adapter, turn, prompt, taking, hosts, select=written_out)
    engine = tiny_engine(adapter, strategy(taking), hosts, scorer)
    handle = engine.prefill(prompt)
    assert (engine.logits(handle) - want.logits).abs().max() < 1e-9
    assert any(want.sizes.rows), "nothing was selected"
    for rank in range(hosts):
        for layer, kv in enumerate(tiny.shards(engine.cluster.host(rank)._caches[handle.id])):
            theirs = want.keys[layer][:, want.rows[rank]]
            torch.testing.assert_close(kv.k_BKTD[0], theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["snapkv", "expected", "norm", "recent", "random"])
def test_compressors_that_ask_nothing_prefill_for_every_question(name: str) -> None:
    engine = tiny_engine(tiny_llama(torch.float32), strategy("apb"), 3, name)
    handle = engine.prefill(make_prompt(120, question=0))
    assert handle.conditioned_on is None and not handle.exact


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("query", {"window": 4}, "compress.window=4"),
        ("snapkv", {"window": 0}, "compress.window=0"),
        ("snapkv", {"observers": 0}, "compress.observers=0"),
        ("expected", {"future": 0}, "compress.future=0"),
        ("retaining", {"window": 2}, "compress.window=2"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compressor(name, **options)


def test_scores_that_are_no_numbers_are_rejected() -> None:
    class Broken(type(compressor("norm"))):  # type: ignore[misc]
        def score(self, block: Any) -> torch.Tensor:
            scores = super().score(block)
            scores[..., 3] = float("nan")
            return scores

    with pytest.raises(UserError, match=r"no numbers.*NaN for"):
        tiny_engine(tiny_llama(torch.float32), strategy("apb"), 3, Broken()).prefill(make_prompt(90))
