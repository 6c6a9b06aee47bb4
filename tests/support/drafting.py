"""What the tests of speculation share: a tiny model with a draft head, engines over it, and an oracle that drafts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apb.decode.base import Decoded, Decoding
from apb.decode.speculate import speculate
from apb.decode.tree import Tree, root_only
from apb.draft.base import DraftHead, LayerShape, share
from apb.draft.draft import Draft
from apb.draft.eagle import EagleHead
from apb.draft.spec import DraftSpec
from apb.models.adapter import Adapter
from apb.plan.draft import Handoff
from apb.prompt.prompt import Prompt
from apb.strategies import strategy
from tests.support import asking, tiny
from tests.support.asking import VOCAB
from tests.support.tiny import TinyEngine, tiny_engine

WINDOW, SINKS = 24, 3
LAYER = LayerShape(64, 96, 4, 2, 16, 1e-5)


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


def prompt(context: int = 149) -> Prompt:
    """Return a random prompt."""
    return asking.prompt(context=context)


def make_handoff(draft: Draft, window: int | None = WINDOW, adaptive: int = 0) -> Handoff:
    """Return what hosts hand over to that draft head; ``adaptive`` as for ``engine``."""
    rows, seen = adaptive * LAYER.hidden_size, LAYER.hidden_size * max(1, len(draft.head.taps))
    weights = sum(p.numel() for p in draft.head.parameters()) + rows
    return Handoff(window, SINKS, 2, 16, 8, -(-VOCAB // 8) if adaptive else 0, seen, 8 * weights, 8 * rows)


def engine(hosts: int, name: str = "apb", window: int | None = WINDOW, adaptive: int = 0) -> TinyEngine:
    """Return an engine with a draft head; ``adaptive``: ids that it drafts from, the prompt's among them; 0: all."""
    adapter = copy.copy(model())  # the model stays shared
    head = share(model().draft.head)
    head.window = window
    adapter.draft = Draft(head)
    if adaptive:
        ranked = torch.arange(VOCAB).flip(0)
        adapter.draft = Draft(
            head.with_vocab(torch.cat([torch.zeros(1, dtype=torch.int64), ranked[: adaptive - 1]])), ranked, (0,)
        )
    made = tiny_engine(adapter, strategy(name), hosts, "query" if strategy(name).takes_compressor else None)
    handoff = make_handoff(adapter.draft, window, adaptive)
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
    step_sizes = frozenset[int]()

    def generate(self, decoding: Decoding) -> Decoded:
        return speculate(decoding, OracleDrafter(self) if decoding.decides else None, self.tree_tokens)


class OracleDrafter:
    head_rows = 0

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self._random = oracle, random.Random(oracle.seed)

    def draft(self, decided: Sequence[int], root: int, position: int, depth: int) -> Tree:
        o, r = self.oracle, self._random
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
