"""One cell of the matrix of families: hosts, layout and length, held against whole runs of transformers' own model.

Shapes: V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apb.decode.base import Decoder
from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.draft.base import LayerShape
from apb.draft.draft import Draft
from apb.draft.eagle import EagleHead
from apb.draft.spec import DraftSpec
from apb.engine.handle import KVHandle
from apb.models.adapter import Adapter
from apb.plan.bytes import bytes_by_kind
from apb.plan.draft import Handoff
from apb.plan.report import plan_document
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from burst.errors import UserError
from tests.support.families import VOCAB, adapt_family, build_family, whole_greedy, whole_logits
from tests.support.tiny import TinyEngine, tiny_engine

LIMIT = 1e-4  # of fp32 logits
TIE = 2 * LIMIT  # between the likeliest two tokens: either may be decided
WINDOW, SINKS = 24, 3  # of the draft head
DECODERS: dict[str, Decoder] = {"lookup": Lookup(match=1), "eagle2": Eagle2(depth=3, width=4, tokens=14)}


@dataclass(frozen=True)
class Cell:
    """A family over hosts, and what is done with it."""

    family: str
    hosts: int
    layout: str = "zigzag"
    context: int = 101
    tokens: int = 8
    chunks: tuple[int, ...] = ()
    decoders: tuple[str, ...] = ()
    reuse: bool = False  # forks, a second question, a gathered cache

    @property
    def key(self) -> str:
        """Its name among rows."""
        return f"{self.family}/{self.layout}/{self.hosts} hosts/{self.context} tokens"


@dataclass
class Found:
    """What a cell gave: the greatest difference of logits, and everything that was not as it should be."""

    error: float = 0.0
    ties: int = 0
    failed: list[str] = field(default_factory=list)
    rejected: str = ""

    def check(self, what: str, fine: bool, words: object = "") -> None:
        """Note what failed."""
        if not fine:
            self.failed.append(f"{what}: {words}"[:300])


def run(cell: Cell) -> Found:
    """Run one cell; an exception is one of its failures."""
    found = Found()
    try:
        adapter(cell.family, "eagle2" in cell.decoders)
    except UserError as error:
        return Found(rejected=error.message)
    try:
        _run(cell, found)
    except Exception as error:  # a row of the matrix says what broke; others go on
        last = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({'/'.join(last.filename.split('/')[-3:])}:{last.lineno})"
        found.check("raised", False, " ".join(words.split()))
    return found


def _run(cell: Cell, found: Found) -> None:
    prompt, other = question(cell.context, 1), question(cell.context, 2)
    engine = _engine(cell, None)
    handle = engine.prefill(prompt)
    plan = engine.setup.plan(prompt)
    logits_V = _logits(found, "prefill", engine, handle, cell)
    found.check("exact", handle.exact and handle.conditioned_on is None)
    planned = bytes_by_kind(plan, prompt.lengths.query)
    sent = handle.metrics["bytes_by_kind"]
    found.check(
        "bytes of the prefill", sent == planned == plan_document(plan)["bytes_by_kind"], f"{sent} for {planned}"
    )
    copies = {name: handle.fork() for name in cell.decoders}
    asked = handle.fork(other.question) if cell.reuse else None
    gathered = handle.gather(cell.hosts // 2) if cell.reuse else None
    result = _tokens(found, "greedy", engine, handle, cell)
    planned = bytes_by_kind(plan, prompt.lengths.query, cell.tokens, cell.tokens - 1)
    sent = result.metrics["bytes_by_kind"]
    found.check("bytes of the answer", sent == planned, f"{sent} for {planned}")
    for name, copy in copies.items():
        _tokens(found, name, engine, copy, cell, decode=DECODERS[name])
    if asked is not None and gathered is not None:
        _tokens(found, "gathered", engine, gathered, cell)
        _logits(found, "second question", engine, asked, cell)
        _tokens(found, "second question", engine, asked.fork(), cell)
        _tokens(found, "second question gathered", engine, asked.gather(0), cell)
        again = handle.fork(prompt.question)
        _logits(found, "first question again", engine, again, cell)
        found.check("bits of the first question again", torch.equal(engine.logits(again), logits_V))
        _tokens(found, "first question again", engine, again, cell)
    engine.close()
    for chunk in cell.chunks:
        engine = _engine(cell, chunk)
        handle = engine.prefill(prompt)
        _logits(found, f"chunks of {chunk}", engine, handle, cell)
        kinds = handle.metrics["bytes_by_kind"]
        planned = bytes_by_kind(plan, prompt.lengths.query)
        found.check(f"bytes with chunks of {chunk}", kinds == planned, f"{kinds} for {planned}")
        _tokens(found, f"chunks of {chunk}", engine, handle, cell)
        engine.close()


def _logits(found: Found, what: str, engine: TinyEngine, handle: KVHandle, cell: Cell) -> Tensor:
    logits_V = engine.logits(handle)
    error = float((logits_V - wanted(cell.family, handle.prompt)).abs().max())
    found.error = max(found.error, error)
    found.check(f"logits, {what}", error <= LIMIT, f"{error:.1e}")
    return logits_V


def _tokens(found: Found, what: str, engine: TinyEngine, handle: KVHandle, cell: Cell, **options: Any) -> Any:
    result = engine.generate(handle, max_new_tokens=cell.tokens, **options)
    want = greedy(cell.family, handle.prompt, cell.tokens)
    at = next((i for i, (mine, their) in enumerate(zip(result.token_ids, want, strict=False)) if mine != their), None)
    if at is None:
        found.check(f"tokens, {what}", len(result.token_ids) == len(want), f"{len(result.token_ids)} tokens")
        return result
    logits_V = whole_logits(reference(cell.family), (*handle.prompt.token_ids, *want[:at]))[-1]
    gap = abs(float(logits_V[want[at]] - logits_V[result.token_ids[at]]))
    found.ties += gap <= TIE
    found.check(f"tokens, {what}", gap <= TIE, f"token {at} of {len(want)} is {gap:.1e} from the likeliest")
    return result


def _engine(cell: Cell, chunk: int | None) -> TinyEngine:
    made = strategy("full") if cell.hosts == 1 else strategy("ring", layout=cell.layout)
    engine = tiny_engine(adapter(cell.family, "eagle2" in cell.decoders), made, cell.hosts)
    engine.setup = dataclasses.replace(engine.setup, chunk_tokens=chunk)
    draft = engine.cluster.host(0).adapter.draft
    if draft is not None:
        spec = dataclasses.replace(engine.setup.spec, draft=DraftSpec("random"))
        engine.setup = dataclasses.replace(engine.setup, spec=spec, handoff=_handoff(draft))
    return engine


def _handoff(draft: Draft) -> Handoff:
    weights = sum(p.numel() for p in draft.head.parameters())
    return Handoff(
        WINDOW, SINKS, draft.head.kv_heads, draft.head.head_dim, 4, 0, draft.head.target.shape.hidden, 4 * weights, 0
    )


@functools.cache
def adapter(family: str, draft: bool) -> Adapter:
    """Return a family's model behind an adapter, with a random draft head or without one."""
    made = adapt_family(family)
    if draft:
        torch.manual_seed(1)
        layer = LayerShape(64, 96, 4, 2, made.shape.heads.qk_dim, 1e-5)  # all families are 64 wide
        head = EagleHead(layer, made.draft_target(), fc_bias=True, window=WINDOW, sinks=SINKS)
        made.draft = Draft(head.to(made.dtype).eval().requires_grad_(False))
    return made


@functools.cache
def reference(family: str) -> Any:
    """Return the family's own model."""
    return build_family(family)


@functools.lru_cache(maxsize=256)
def wanted(family: str, prompt: Prompt) -> Tensor:
    """Return the logits (V,) after a prompt, by a whole run."""
    return whole_logits(reference(family), prompt.token_ids)[-1]


@functools.lru_cache(maxsize=256)
def greedy(family: str, prompt: Prompt, tokens: int) -> tuple[int, ...]:
    """Return the greedy tokens after a prompt, by whole runs."""
    return whole_greedy(reference(family), prompt.token_ids, tokens)


def question(context: int, seed: int) -> Prompt:
    """Return a prompt with a context of so many tokens, the same for all seeds, and a question of its seed."""
    asked = Question(ids(2, seed), ids(4 + seed, 10 + seed), ids(1, 20 + seed), None)
    return Prompt(ids(context, 99), min(3, context - 1), asked)


def ids(count: int, seed: int) -> tuple[int, ...]:
    """Return that many token ids, many of them several times: prompt lookup then finds some."""
    gen = torch.Generator().manual_seed(seed)
    return tuple((3 + torch.randint(VOCAB - 3, (count,), generator=gen)).tolist())


def cells(families: Sequence[str]) -> Iterator[Cell]:
    """Yield the whole grid for these families; no answer crosses the length from which on LongRoPE turns otherwise."""
    for family in families:
        for hosts in (1, 2, 3, 5, 8):
            for layout in ("contiguous", "zigzag") if hosts > 1 else ("contiguous",):
                for context in sorted({2 * hosts, 2 * hosts + 1, 31, 69, 203, 500}):
                    decoders = ("lookup", "eagle2") if context in (31, 203) else ()
                    chunks = (1, 3, 64, 100) if context == 203 and hosts in (1, 3) else (3,) if context == 69 else ()
                    yield Cell(family, hosts, layout, context, 32, chunks, decoders, context in (2 * hosts, 69, 203))
