"""The draft head's own keys and values, and its vocabulary, as hosts hand them over."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from apb.decode.base import forward
from apb.decode.eagle2 import Eagle2
from apb.decode.tree import capacity
from apb.draft.base import DraftHead
from apb.draft.draft import Draft
from apb.draft.eagle3 import Eagle3Head
from apb.draft.minicpm import MiniCpmHead
from apb.draft.spec import DraftSpec
from apb.draft.vocab import bitmap
from apb.plan.bytes import bytes_by_kind
from apb.prompt.prompt import Prompt
from apb.strategies import strategy
from burst.errors import UserError
from tests.support import tiny
from tests.support.asking import VOCAB, ids
from tests.support.drafting import LAYER, SINKS, WINDOW, engine, make_handoff, model, prompt
from tests.support.tiny import tiny_engine


@pytest.mark.parametrize(("name", "hosts"), [("full", 1), ("apb", 3), ("spava", 2), ("ring", 4), ("ulysses", 2)])
@pytest.mark.parametrize("window", [WINDOW, None, 1000, 3])
def test_the_drafts_own_rows_are_those_of_its_window(name: str, hosts: int, window: int | None) -> None:
    e = engine(hosts, name, window=window)
    p = prompt()
    assert p.question is not None
    handle = e.prefill(p)
    host = e.cluster.host(handle.owner)
    draft = host._caches[handle.id].draft
    assert draft is not None
    context, total = len(p.context_ids), len(p.token_ids)
    first = 0 if window is None else context - window
    wanted = [at for at in range(context - 1) if at >= first or (window is not None and at < SINKS)]
    assert list(draft.positions) == wanted + list(range(context, total - 1))
    plan = e.setup.plan(p)
    assert handle.metrics["bytes_by_kind"].get("draft", 0) == bytes_by_kind(plan, 0).get("draft", 0)
    rows = sum(1 for at in wanted if handle.locate(at)[0] != handle.owner)
    assert bytes_by_kind(plan, 0).get("draft", 0) == rows * 2 * 2 * 16 * 8
    if name in ("apb", "spava"):  # features of an approximate pass are its own
        return
    features = dense_features(p)
    at = torch.tensor(list(draft.positions))
    ids_BS = torch.tensor([[p.token_ids[i + 1] for i in draft.positions]])
    wanted_rows = draft.head.keys_values(features[at][None], ids_BS, at)
    kept = draft.rows()
    assert kept is not None
    for found, want in zip((kept.k_BKTD, kept.v_BKTE), wanted_rows, strict=True):
        known = slice(1 if wanted[0] == 0 else 0, None)  # the first token's feature is not among those
        torch.testing.assert_close(found[:, :, known], want[:, :, known], atol=1e-11, rtol=1e-11)


def dense_features(p: Prompt) -> torch.Tensor:
    """Return the final norm's output of every prompt token but the first, run on one host as one question."""
    e = engine(1, "full", window=None)
    bare = e.prefill(Prompt(p.token_ids[:1], 1, None), chat=False)
    seen: list[torch.Tensor] = []
    draft = e.cluster.host(0)._caches[bare.id].draft
    assert draft is not None
    observe = draft.observe
    draft.observe = lambda features, ids, start: (seen.append(features), observe(features, ids, start))  # type: ignore
    cache = e.cluster.host(0)._caches[bare.id]
    with torch.inference_mode():
        forward(
            e.cluster.host(0).adapter, e.cluster.host(0).kernel, e.cluster.world.transports[0], cache, p.token_ids[1:]
        )
    return torch.cat([seen[0][:1] * torch.nan, seen[0]])


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(("name", "hosts"), [("full", 1), ("apb", 2), ("ring", 2)])
def test_features_of_chunks_are_those_of_whole_blocks(name: str, hosts: int, chunk: int) -> None:
    rows = []
    for tokens in (None, chunk):
        e = engine(hosts, name, window=None)
        e.setup = dataclasses.replace(e.setup, chunk_tokens=tokens)
        handle = e.prefill(prompt())
        draft = e.cluster.host(handle.owner)._caches[handle.id].draft
        assert draft is not None
        kv = draft.rows()
        assert kv is not None
        rows.append(kv)
    torch.testing.assert_close(rows[1].k_BKTD, rows[0].k_BKTD, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(rows[1].v_BKTE, rows[0].v_BKTE, atol=1e-11, rtol=1e-11)


def test_forks_and_gathered_caches_draft_too() -> None:
    e = engine(3)
    handle = e.prefill(prompt())
    made = Eagle2(depth=3, width=4, tokens=14)
    other = list(ids(9, 12))
    asked = handle.fork(query=other)
    want = e.generate(asked.fork(), max_new_tokens=20).token_ids
    assert e.generate(asked, max_new_tokens=20, decode=made).token_ids == want
    want = e.generate(handle.fork(), max_new_tokens=20).token_ids
    for rank in range(3):
        moved = handle.gather(rank)
        got = e.generate(moved, max_new_tokens=20, decode=made)
        assert got.token_ids == want and got.metrics["hosts_decoding"] == 1
        draft = e.cluster.host(rank)._caches[moved.id].draft
        assert draft is not None
        # Straight after the prompt the last token's feature stays behind: its row is missing elsewhere.
        last = len(prompt().token_ids) - 1
        assert (last in draft.positions) == (rank == handle.owner)
        assert draft.positions[-1] == last + 19 - 1 and set(range(last + 1, last + 18)) <= set(draft.positions)


def test_a_vocabulary_that_adapts_has_the_prompts_ids() -> None:
    e = engine(3, adaptive=40)
    handle = e.prefill(prompt())
    want = e.generate(handle.fork(), max_new_tokens=15).token_ids
    got = e.generate(handle, max_new_tokens=15, decode=Eagle2(depth=3, width=4, tokens=14))
    assert got.token_ids == want
    draft = e.cluster.host(handle.owner)._caches[handle.id].draft
    assert draft is not None
    ids_V = draft.head.ids_V.tolist()
    assert len(ids_V) == len(set(ids_V)) == 40 < len(set(prompt().token_ids))
    assert set(ids_V) - {0} <= set(prompt().token_ids) and 0 in ids_V  # a stop token is always kept
    peers, bits = 2, -(-VOCAB // 8)
    assert handle.metrics["bytes_by_kind"]["draft"] == bytes_by_kind(e.setup.plan(prompt()), 0)["draft"]
    assert handle.metrics["bytes_by_kind"]["draft"] % 8 == peers * bits % 8
    assert got.metrics["drafting"]["head_rows"] % 40 == 0
    assert handle.gather(0).metrics["bytes_by_kind"]["gather"] > 0


def test_a_vocabulary_smaller_than_a_trees_width_gives_smaller_trees() -> None:
    e = engine(2, adaptive=3)
    handle = e.prefill(prompt())
    want = e.generate(handle.fork(), max_new_tokens=12).token_ids
    got = e.generate(handle, max_new_tokens=12, decode=Eagle2(depth=2, width=8, tokens=60))
    assert got.token_ids == want
    drafting = got.metrics["drafting"]
    assert drafting["steps"] < drafting["rows"] <= drafting["steps"] * (1 + capacity(2, 3))


def test_minicpm_heads_draft_too() -> None:
    adapter = copy.copy(model())
    torch.manual_seed(4)
    head = MiniCpmHead(LAYER, adapter.draft_target(), fc_bias=False, scale_depth=1.4, window=WINDOW, sinks=SINKS)
    adapter.draft = Draft(head.to(torch.float64).eval().requires_grad_(False))
    e = tiny_engine(adapter, strategy("apb"), 3, "query")
    spec = dataclasses.replace(e.setup.spec, draft=DraftSpec("tiny"))
    e.setup = dataclasses.replace(e.setup, spec=spec, handoff=make_handoff(adapter.draft))
    handle = e.prefill(prompt())
    want = e.generate(handle.fork(), max_new_tokens=12).token_ids
    got = e.generate(handle, max_new_tokens=12, decode=Eagle2(depth=3, width=4, tokens=12))
    assert got.token_ids == want and got.metrics["drafting"]["rows"] > got.metrics["drafting"]["steps"]


@pytest.mark.parametrize("own_vocabulary", [False, True])
def test_eagle3_heads_draft_too(own_vocabulary: bool) -> None:
    adapter = copy.copy(model())
    torch.manual_seed(2)
    some = torch.arange(0, VOCAB, 2) if own_vocabulary else torch.arange(VOCAB)
    head: DraftHead = Eagle3Head(LAYER, adapter.draft_target(), some, window=WINDOW, sinks=SINKS)
    head = head.to(torch.float64).eval().requires_grad_(False)
    ranked = some.flip(0)
    adapter.draft = Draft(head.with_vocab(ranked[:30]), ranked, stop_ids=(0,), own_bits=bitmap(some, VOCAB))
    e = tiny_engine(adapter, strategy("apb"), 3, "query")
    spec = dataclasses.replace(e.setup.spec, draft=DraftSpec("tiny"))
    handoff = make_handoff(adapter.draft, adaptive=30)
    e.setup = dataclasses.replace(e.setup, spec=spec, handoff=handoff)
    handle = e.prefill(prompt())
    want = e.generate(handle.fork(), max_new_tokens=16).token_ids
    got = e.generate(handle, max_new_tokens=16, decode=Eagle2(depth=3, width=4, tokens=12))
    assert got.token_ids == want
    draft = e.cluster.host(handle.owner)._caches[handle.id].draft
    assert draft is not None and len(draft.head.ids_V) == 30
    assert set(draft.head.ids_V.tolist()) <= set(some.tolist())


def test_a_head_for_three_taps_needs_three_layers() -> None:
    shallow = tiny.adapt(tiny.llama_config(vocab_size=VOCAB, num_hidden_layers=2))
    with pytest.raises(UserError, match="too few layers"):
        Eagle3Head(LAYER, shallow.draft_target(), torch.arange(4), window=None, sinks=0)
