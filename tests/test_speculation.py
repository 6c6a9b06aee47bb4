"""Speculation over sharded caches gives the tokens of decoding without drafts, whatever is drafted."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from apb.decode.base import Decoded, Decoding
from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.decode.speculate import speculate
from apb.decode.tree import Tree, root_only
from apb.draft.base import DraftHead, LayerShape
from apb.draft.draft import Draft
from apb.draft.eagle import EagleHead
from apb.draft.handoff import Handoff
from apb.draft.spec import DraftSpec
from apb.models.adapter import Adapter
from apb.prompt import Prompt, Question
from apb.strategies import strategy
from tests import tiny
from tests.tiny import TinyEngine, byte_tokenizer, tiny_engine

VOCAB = len(byte_tokenizer())
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "seed": 7}
WINDOW, SINKS = 24, 3


def draft_head(adapter: Adapter, seed: int = 1) -> DraftHead:
    """Return a random EAGLE head for a model."""
    torch.manual_seed(seed)
    head = EagleHead(
        LayerShape(64, 96, 4, 2, 16, 1e-5), adapter.draft_target(), fc_bias=True, window=WINDOW, sinks=SINKS
    )
    return head.to(adapter.dtype).eval().requires_grad_(False)


@functools.cache
def model(dtype: torch.dtype = torch.float64) -> Adapter:
    """Return a model with a draft head, whose every token the tokenizer knows."""
    adapter = tiny.adapt(
        tiny.llama_config(vocab_size=VOCAB, max_position_embeddings=400), dtype
    )  # fp64: random fp32 logits are nearly tied too often
    adapter.draft = Draft(draft_head(adapter))
    return adapter


def ids(count: int, seed: int) -> tuple[int, ...]:
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, VOCAB, (count,), generator=gen).tolist())


def prompt(context: int = 149) -> Prompt:
    return Prompt(ids(context, 4), 5, Question(ids(2, 1), ids(6, 2), ids(3, 3), None))


def engine(hosts: int, name: str = "apb", dtype: torch.dtype = torch.float64, **options: Any) -> TinyEngine:
    takes = strategy(name).takes_compressor
    made = tiny_engine(model(dtype), strategy(name, **options), hosts, "query" if takes else None)
    handoff = Handoff(WINDOW, SINKS, 2, 16, dtype.itemsize, 0)
    spec = dataclasses.replace(made.setup.spec, draft=DraftSpec("tiny"))
    made.setup = dataclasses.replace(made.setup, spec=spec, handoff=handoff)
    return made


@dataclass(frozen=True)
class Oracle:
    """Drafts random trees, of which some path is the answer for some of its length."""

    answer: tuple[int, ...]  # the tokens that will be decided, by position from ``start``
    start: int
    seed: int
    tree_tokens: int = 12

    name = "oracle"
    needs_head = False
    needs_history = False

    def generate(self, decoding: Decoding) -> Decoded:
        return speculate(decoding, OracleDrafter(self) if decoding.decides else None, self.tree_tokens)


class OracleDrafter:
    head_rows = 0

    def __init__(self, oracle: Oracle) -> None:
        self._oracle, self._random = oracle, random.Random(oracle.seed)

    def draft(self, decided: Sequence[int], root: int, position: int, depth: int) -> Tree:
        o, r = self._oracle, self._random
        at = position - o.start
        assert o.answer[at] == root and list(o.answer[: at + 1])[at + 1 - len(decided) :] == list(decided)
        tree = root_only(root)
        for _ in range(r.randrange(4)):
            true = list(o.answer[at + 1 : at + 1 + r.randrange(6)])
            wrong = [r.randrange(VOCAB) for _ in range(r.randrange(4))]
            tree = tree.grafted((true + wrong)[:depth], o.tree_tokens)
        return tree

    def verified(self, rows: int, seconds: float) -> None:
        assert rows >= 1 and seconds > 0


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("name", "hosts"), [("full", 1), ("apb", 2), ("apb", 4), ("spava", 3), ("ring", 8), ("usp", 4)]
)
def test_any_tree_gives_the_tokens_of_decoding_without_one(name: str, hosts: int, options: dict[str, Any]) -> None:
    e = engine(hosts, name)
    handle = e.prefill(prompt())
    plain = handle.fork()
    want = e.generate(plain, max_new_tokens=30, **options).token_ids
    more = e.generate(plain, max_new_tokens=9, **options).token_ids
    oracle = Oracle(want + more, handle.next_position, seed=hosts)
    got = e.generate(handle, max_new_tokens=30, decode=oracle, **options)
    assert got.token_ids == want
    assert got.metrics["accepted_length"] > 1.2
    drafting = got.metrics["drafting"]
    assert drafting["decided"] == 29 and drafting["steps"] < 29 <= drafting["rows"]
    # The cache goes on from there, without drafts as with them.
    fork = handle.fork()
    assert e.generate(handle, max_new_tokens=9, decode=oracle, **options).token_ids == more
    assert e.generate(fork, max_new_tokens=9, **options).token_ids == more


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("name", "hosts"), [("full", 1), ("apb", 3), ("spava", 4), ("ring", 2)])
@pytest.mark.parametrize("how", ["tree", "chain", "auto", "merged", "lookup"])
def test_decoders_agree(how: str, name: str, hosts: int, options: dict[str, Any]) -> None:
    made = {
        "tree": Eagle2(depth=3, width=4, tokens=14),
        "chain": Eagle2(depth=4, width=1, tokens=5),
        "auto": Eagle2(depth=3, width=4, tokens=14, tree="auto"),
        "merged": Eagle2(depth=5, width=4, tokens=14, lookup=True),
        "lookup": Lookup(match=1),
    }[how]
    e = engine(hosts, name)
    handle = e.prefill(prompt())
    want = e.generate(handle.fork(), max_new_tokens=40, **options).token_ids
    got = e.generate(handle, max_new_tokens=40, decode=made, **options)
    assert got.token_ids == want
    assert got.metrics["decoder"] == made.name
    assert got.metrics["drafting"]["rows"] > got.metrics["drafting"]["steps"]
