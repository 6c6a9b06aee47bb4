"""Speculation over sharded caches gives the tokens of decoding without drafts, whatever is drafted."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from apb.attention.cached import CacheAttention
from apb.decode import decoder
from apb.decode.base import Decoded, DecodeRequest, Decoding
from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.decode.placement import Links, gathered_bytes, gathering_pays
from apb.decode.speculate import WORD_BYTES, decision_words, speculate, verify
from apb.decode.tree import Tree, root_only
from apb.engine.requests import prefill_request
from apb.host.host import Host
from apb.host.messages import HostSpec, PrefillRequest
from apb.kv.cache import HostCache
from apb.layers.call import AttentionCall
from apb.layers.full import Full, FullCache
from apb.layers.rows import LayerKV
from apb.plan.bytes import TOKEN_BYTES, partial_bytes
from burst.errors import UserError
from burst.kernels.cpu import KERNEL
from burst.transport import Transport, VirtualWorld
from tests.support.asking import SAMPLED
from tests.support.drafting import Oracle, OracleDrafter, engine, model, prompt
from tests.support.pool import Rank, shared_pool
from tests.support.tiny import TinyEngine


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
@pytest.mark.parametrize(("name", "hosts"), [("full", 1), ("apb", 3), ("spava", 2)])
@pytest.mark.parametrize("how", ["tree", "chain", "auto", "merged", "lookup", "large"])
def test_decoders_agree(how: str, name: str, hosts: int, options: dict[str, Any]) -> None:
    made = {
        "tree": Eagle2(depth=3, width=4, tokens=14),
        "chain": Eagle2(depth=4, width=1, tokens=5),
        "auto": Eagle2(depth=3, width=4, tokens=14, tree="auto"),
        "merged": Eagle2(depth=5, width=4, tokens=14, lookup=True),
        "lookup": Lookup(match=1),
        "large": Eagle2(depth=4, width=8, tokens=150),  # more rows than a machine word has bits
    }[how]
    e = engine(hosts, name)
    handle = e.prefill(prompt())
    want = e.generate(handle.fork(), max_new_tokens=40, **options).token_ids
    got = e.generate(handle, max_new_tokens=40, decode=made, **options)
    assert got.token_ids == want
    assert got.metrics["decoder"] == made.name
    assert got.metrics["drafting"]["rows"] > got.metrics["drafting"]["steps"] * (64 if how == "large" else 1)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["ring", "burst"])  # interleaved shards, and blocks
def test_a_tree_verified_over_shards_is_verified_as_on_one_host(name: str, hosts: int) -> None:
    tree = root_only(7).grafted([3, 4, 5], 99).grafted([3, 9, 8, 7], 99).grafted([11, 12], 99)
    found = []
    for e in (engine(hosts, name), engine(1, "full")):
        handle = e.prefill(prompt())
        e.generate(handle, max_new_tokens=3)
        found.append(verified(e, handle.id, tree))
    (logits, features), (want, want_features) = found
    assert (logits - want).abs().max() < 1e-12 * want.abs().max()
    assert (features - want_features).abs().max() < 1e-12 * want_features.abs().max()
    # And row by row it is what running the path to each row gives.
    e = engine(1, "full")
    for row, depth in enumerate(tree.depths):
        handle = e.prefill(prompt())
        e.generate(handle, max_new_tokens=3)
        path, at = [], row
        while at >= 0:
            path.insert(0, tree.tokens[at])
            at = tree.parents[at]
        chain = root_only(path[0]).grafted(path[1:], 99)
        assert len(chain) == depth + 1
        torch.testing.assert_close(verified(e, handle.id, chain)[0][-1], logits[row], atol=1e-11, rtol=1e-11)


def verified(e: TinyEngine, handle: str, tree: Tree) -> tuple[torch.Tensor, torch.Tensor]:
    """Verify a tree on all of an engine's hosts; return the owner's logits and features."""

    def run(transport: Transport) -> Any:
        host = e.cluster.host(transport.rank)
        cache = host._caches[handle]
        request = DecodeRequest(Lookup())
        d = Decoding(host.adapter, host.kernel, transport, cache, request, None, lambda token: None, time.perf_counter)
        with torch.inference_mode():
            return verify(d, tree.tokens, tree.parents, tree if d.decides else None)

    results = e.cluster.world.run(run)
    (found,) = [result for result in results if result is not None]
    return found


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_answers_end_where_they_would_without_drafts(options: dict[str, Any]) -> None:
    e = engine(2)
    handle = e.prefill(prompt())
    free = e.generate(handle.fork(), max_new_tokens=30, **options)
    oracle = Oracle(free.token_ids, handle.next_position, seed=2)
    for count in (1, 2, 3, 4, 7):  # inside paths and at their ends
        got = e.generate(handle.fork(), max_new_tokens=count, decode=oracle, **options)
        assert (got.token_ids, got.finish_reason) == (free.token_ids[:count], "length")
    for at in range(2, 12):
        token = free.token_ids[at]
        if token in free.token_ids[:at]:
            continue
        e.stop_ids = (token,)
        plain, drafted = handle.fork(), handle.fork()
        want = e.generate(plain, max_new_tokens=30, **options)
        got = e.generate(drafted, max_new_tokens=30, decode=oracle, **options)
        assert (got.token_ids, got.text, got.finish_reason) == (free.token_ids[: at + 1], want.text, "stop")
        e.stop_ids = ()
        more = e.generate(plain, max_new_tokens=5, **options).token_ids
        assert e.generate(drafted, max_new_tokens=5, **options).token_ids == more
    for start in range(1, len(free.text) - 1, 3):
        stop = free.text[start : start + 2]
        want = e.generate(handle.fork(), max_new_tokens=30, stop=stop, **options)
        pieces: list[str] = []
        got = e.generate(handle.fork(), max_new_tokens=30, stop=stop, decode=oracle, on_token=pieces.append, **options)
        assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
        assert "".join(pieces) == got.text


@dataclasses.dataclass(frozen=True)
class Telltale(Oracle):
    """An oracle that notes when it is asked for a draft."""

    said: list[str] = dataclasses.field(default_factory=list)

    def generate(self, decoding: Decoding) -> Decoded:
        return speculate(decoding, TelltaleDrafter(self) if decoding.decides else None, self.tree_tokens)


class TelltaleDrafter(OracleDrafter):
    def draft(self, decided: Sequence[int], root: int, position: int, depth: int) -> Tree:
        assert isinstance(self.oracle, Telltale)
        self.oracle.said.append("draft")
        return super().draft(decided, root, position, depth)


@pytest.mark.parametrize("hosts", [1, 3])
def test_the_first_token_is_told_before_anything_is_drafted(hosts: int) -> None:
    e = engine(hosts, "full" if hosts == 1 else "apb")
    handle = e.prefill(prompt(143))  # to which the first token is a whole character
    want = e.generate(handle.fork(), max_new_tokens=6)
    first = e.generate(handle.fork(), max_new_tokens=1)
    decode = Telltale(want.token_ids, handle.next_position, seed=1)
    got = e.generate(handle.fork(), max_new_tokens=6, decode=decode, on_token=decode.said.append)
    assert got.token_ids == want.token_ids
    assert decode.said[:2] == [first.text, "draft"]
    # One that ends the answer is told, and nothing is drafted for it.
    decode.said.clear()
    e.stop_ids = first.token_ids
    ended = e.generate(handle, max_new_tokens=6, decode=decode)
    assert (ended.token_ids, ended.finish_reason, decode.said) == (first.token_ids, "stop", [])
    assert ended.metrics["accepted_length"] is None


def test_the_last_positions_of_a_model_are_used_and_none_beyond() -> None:
    e = engine(2)
    limit = e.setup.shape.max_positions
    handle = e.prefill(prompt(limit - 11 - 12))
    want = e.generate(handle.fork(), max_new_tokens=12).token_ids
    got = e.generate(handle.fork(), max_new_tokens=12, decode=Oracle(want, handle.next_position, seed=3))
    assert got.token_ids == want
    assert e.generate(handle, max_new_tokens=12, decode=Eagle2(depth=5, width=3, tokens=30)).token_ids == want
    with pytest.raises(UserError, match="longer than the model's context"):
        e.generate(handle, max_new_tokens=1, decode=Lookup())


def test_placements_give_the_same_tokens() -> None:
    e = engine(3)
    handle = e.prefill(prompt())
    want = e.generate(handle.fork(), max_new_tokens=8).token_ids
    for placement, hosts in (("sharded", {3}), ("gathered", {1}), ("auto", {1, 3})):
        placed = handle.fork()
        got = e.generate(placed, max_new_tokens=8, placement=placement, decode=Lookup())
        assert got.token_ids == want and got.metrics["hosts_decoding"] in hosts
        assert placed.locate(0)[0] == (handle.owner if got.metrics["hosts_decoding"] == 1 else 0)
        assert e.generate(placed, max_new_tokens=3).token_ids  # and it goes on
    assert handle.locate(0)[0] == 0
    with pytest.raises(UserError, match="placement"):
        e.generate(handle, placement="moved")


@pytest.mark.parametrize("slow", [True, False])
def test_a_cache_is_gathered_only_where_it_fits(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    e = engine(3)
    handle, shape = e.prefill(prompt()), e.setup.shape
    want = e.generate(handle.fork(), max_new_tokens=8).token_ids
    e._gathering._links = Links(1.0 if slow else 1e-9, 1e12, 1e12)
    need = gathered_bytes(shape, 149 + 11, 8, Lookup().tokens)
    assert need > (149 + 11 + 8) * shape.kv_bytes
    for free in (need - 1, need):
        monkeypatch.setattr("apb.host.host.available_bytes", lambda device, free=free: free)
        auto = handle.fork()
        got = e.generate(auto, max_new_tokens=8, placement="auto", decode=Lookup())
        assert got.token_ids == want
        assert got.metrics["hosts_decoding"] == (1 if slow and free == need else 3)
    monkeypatch.setattr("apb.host.host.available_bytes", lambda device: need - 1)
    with pytest.raises(UserError, match="does not fit") as refused:
        e.generate(handle, max_new_tokens=8, placement="gathered", decode=Lookup())
    assert "host 2" in str(refused.value) and "decode.placement=sharded" in refused.value.remedy
    monkeypatch.setattr("apb.host.host.available_bytes", lambda device: 10_000)
    with pytest.raises(UserError, match="does not fit"):
        handle.gather(0)
    assert e.generate(handle, max_new_tokens=8).token_ids == want  # it lies as it lay
    monkeypatch.setattr("apb.host.host.available_bytes", lambda device: need)
    assert handle.gather(0).owner == 0


def test_gathering_pays_for_long_answers_and_slow_links() -> None:
    shape = dataclasses.replace(model().shape, layers=32, mixers=(Full(32, 8, 128, 128),) * 32, element_size=2)
    fast = Links(latency_s=10e-6, bytes_per_s=50e9, read_bytes_per_s=3e12)
    slow = dataclasses.replace(fast, latency_s=5e-3)
    shards = (16_384,) * 8
    assert not gathering_pays(fast, shape, shards, new_tokens=64, tree_tokens=1)
    assert gathering_pays(slow, shape, shards, new_tokens=64, tree_tokens=1)
    assert not gathering_pays(slow, shape, shards, new_tokens=1, tree_tokens=1)
    # One round a layer for a tree of tokens: fewer rounds, so that staying pays longer.
    waits = dataclasses.replace(fast, latency_s=1e-3)
    pays = [next(n for n in range(1, 10**6) if gathering_pays(waits, shape, shards, n, m)) for m in (1, 8)]
    assert pays[0] < pays[1]


def answer_on_rank(me: Rank, requests: list[PrefillRequest], oracle: Oracle) -> tuple[list[int], dict[str, int], int]:
    """Prefill and decode with drafts as a process of its own."""
    host = Host(HostSpec("tiny", "float64", "cpu"), me.transport, model())
    host.prefill(requests[me.index])
    report = host.generate("a", DecodeRequest(oracle, 20))
    assert report.decoded is not None
    drafting = report.decoded.drafting
    return report.decoded.token_ids, report.bytes_by_kind, drafting.rows if drafting is not None else 0


def test_processes_verify_as_virtual_hosts_do() -> None:
    pool, e, p = shared_pool(4), engine(4), prompt()
    handle, plan = e.prefill(p), e.setup.plan(p)
    want = e.generate(handle.fork(), max_new_tokens=20).token_ids
    oracle = Oracle(want, handle.next_position, seed=5)
    requests = [prefill_request("a", p, plan, e.setup.compressor, rank) for rank in range(4)]
    answers = pool.run(answer_on_rank, requests, oracle)
    assert all(tokens == list(want) for tokens, _, _ in answers)
    rows = answers[-1][2]
    virtual = e.generate(handle, max_new_tokens=20, decode=oracle).metrics
    assert virtual["drafting"]["rows"] == rows
    for rank, (_, sent, _) in enumerate(answers):
        assert sent["partials"] == partial_bytes(plan, rows)
        decisions = decision_words(oracle.tree_tokens) * WORD_BYTES * (virtual["drafting"]["steps"] + 1)
        told = 3 * (TOKEN_BYTES + decisions)
        assert sent.get("token", 0) == (told if rank == 3 else 0)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("eagle2", {"depth": 0}, "decode.depth"),
        ("eagle2", {"width": 0}, "decode.width"),
        ("eagle2", {"tokens": 1}, "decode.tokens"),
        ("eagle2", {"depth": 2, "width": 3, "tokens": 14}, "cannot be filled"),
        ("eagle2", {"tree": "large"}, "decode.tree"),
        ("eagle2", {"levels": 2}, "no option 'levels'"),
        ("lookup", {"tokens": 1}, "decode.tokens"),
        ("lookup", {"match": 0}, "decode.match"),
        ("lookahead", {}, "lookahead"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        decoder(name, **options)


def test_a_decoder_that_needs_a_head_says_so() -> None:
    e = engine(2)
    e.setup = dataclasses.replace(e.setup, spec=dataclasses.replace(e.setup.spec, draft=None))
    handle = e.prefill(prompt())
    with pytest.raises(UserError, match="needs a draft head"):
        e.generate(handle, decode="eagle2")
    assert e.generate(handle, max_new_tokens=2, decode="lookup").token_ids


@pytest.mark.parametrize("decode", ["autoregressive", "lookup", "eagle2"])
def test_an_interrupted_answer_leaves_a_cache_that_is_refused(decode: str) -> None:
    e = engine(3)
    handle = e.prefill(prompt())
    other = handle.fork()
    want = e.generate(handle.fork(), max_new_tokens=20).token_ids

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        e.generate(handle, max_new_tokens=20, decode=decode, on_token=interrupt)
    for use in (lambda: e.generate(handle), handle.fork, handle.logits, lambda: handle.gather(0)):
        with pytest.raises(UserError, match="interrupted"):
            use()
    handle.release()
    assert e.generate(other, max_new_tokens=20, decode=decode).token_ids == want


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_a_trees_attention_over_interleaved_shards_is_exact(hosts: int) -> None:
    gen = torch.Generator().manual_seed(hosts)
    tree = root_only(0).grafted([1, 2, 3], 99).grafted([1, 4], 99).grafted([5, 6, 7, 8], 99)
    q, k, v = (torch.randn(1, heads, len(tree), 16, generator=gen, dtype=torch.float64) for heads in (4, 2, 2))
    context, tail = (LayerKV(*torch.randn(2, 1, 2, n, 16, generator=gen, dtype=torch.float64)) for n in (97, 11))
    edges = [97 * i // (2 * hosts) for i in range(2 * hosts + 1)]
    blocks = list(itertools.pairwise(edges))
    held = [(blocks[rank], blocks[-1 - rank]) for rank in range(hosts)]  # one from the start, one from the end

    kind = Full(4, 2, 16, 16)

    def run(transport: Transport) -> torch.Tensor:
        own = [
            torch.cat([x[:, :, a:b] for a, b in held[transport.rank]], dim=2) for x in (context.k_BKTD, context.v_BKTE)
        ]
        layer = FullCache(kind, LayerKV(*own))
        cache = HostCache((kind,), [layer], tuple(range(hosts)), tuple(held), 97 + 11)
        if transport.rank == cache.owner:
            layer.append(tail)
        attention = CacheAttention(cache, transport, KERNEL, cache.length, len(tree), tree.parents)
        return attention(AttentionCall(0, q, k, v, 0.25))

    keys = torch.cat([context.k_BKTD, tail.k_BKTD, k], dim=2)
    values = torch.cat([context.v_BKTE, tail.v_BKTE, v], dim=2)
    seen = torch.cat([torch.ones(len(tree), 108, dtype=torch.bool), tree.mask()], dim=1)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=seen, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    for found in VirtualWorld(hosts).run(run):
        assert (found - want).abs().max() < 1e-12
