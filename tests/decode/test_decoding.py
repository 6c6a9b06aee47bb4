"""Answering over sharded and gathered caches: query phase, decoding, stops, what cannot be generated."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from apb.attention.cached import CacheAttention
from apb.decode.autoregressive import Autoregressive
from apb.decode.base import DecodeRequest
from apb.decode.sampling import Sampling
from apb.engine.requests import prefill_request
from apb.host.host import Host
from apb.host.messages import HostSpec, PrefillRequest
from apb.kv.cache import HostCache
from apb.layers.call import AttentionCall
from apb.layers.full import Full, FullCache
from apb.layers.rows import LayerKV
from apb.plan.bytes import bytes_by_kind
from burst.errors import UserError
from burst.kernels import kernel
from burst.kernels.merge import merge
from burst.transport import VirtualWorld
from tests.support import tiny
from tests.support.asking import HOSTS, SAMPLED, decoded, engine, ids, model, prompt
from tests.support.pool import Rank, shared_pool
from tests.support.tiny import byte_tokenizer
from tests.support.twin import twin

# -- over shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["apb", "spava", "star"])
def test_every_decoded_token_is_the_dense_twins(name: str) -> None:
    e, p = engine(3, name), prompt()
    got = e.generate(e.prefill(p), max_new_tokens=10).token_ids
    select = None if name == "star" else "query"
    assert p.question is not None
    for i, token in enumerate(got):
        asked = dataclasses.replace(p.question, after=p.question.after + got[:i])
        so_far = dataclasses.replace(p, question=asked)
        want = twin(model(), tiny.rotation(model()), so_far, name, 3, select=select)
        assert token == int(want.logits.argmax())


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rank", range(HOSTS))
def test_a_cache_gathered_on_one_host_goes_on_with_the_same_tokens(rank: int, options: dict[str, Any]) -> None:
    e = engine()
    sharded = e.prefill(prompt())
    gathered = sharded.gather(rank)
    assert (gathered.owner, gathered.exact, gathered.conditioned_on) == (rank, False, sharded.conditioned_on)
    torch.testing.assert_close(gathered.logits(), sharded.logits(), atol=0, rtol=0)
    want = e.generate(sharded, max_new_tokens=6, **options)
    assert e.generate(gathered, max_new_tokens=6, **options).token_ids == want.token_ids
    # And from where it stands now, on this host and from there on the next one.
    later = sharded.gather(rank)
    moved = later.gather((rank + 1) % HOSTS)
    go_on = e.generate(sharded, max_new_tokens=6, **options).token_ids
    assert e.generate(later, max_new_tokens=6, **options).token_ids == go_on
    assert e.generate(moved, max_new_tokens=6, **options).token_ids == go_on
    assert moved.token_ids == sharded.token_ids == prompt().token_ids + want.token_ids + go_on


@pytest.mark.parametrize("rank", range(HOSTS))
def test_a_cache_without_a_question_can_be_gathered_and_asked_there(rank: int) -> None:
    e = engine(compress="norm")
    bare = e.prefill(prompt(question=False), chat=False)
    query = list(ids(6, 2))
    want = bare.fork(query=query).logits()
    gathered = bare.gather(rank)
    torch.testing.assert_close(gathered.fork(query=query).logits(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bare.fork(query=query).gather(rank).logits(), want, atol=0, rtol=0)


def test_gathered_bytes_are_the_caches_own() -> None:
    e = engine()
    handle = e.prefill(prompt())
    moved = handle.gather(0)
    shape = e.setup.shape
    elsewhere = sum(length for host, length in handle.blocks if host != 0) + len(prompt().token_ids) - 150
    logits = 4 * shape.vocab
    assert moved.metrics["bytes_by_kind"]["gather"] == elsewhere * shape.kv_bytes + logits
    assert "gather" not in handle.metrics["bytes_by_kind"]
    for metrics in (handle.metrics, moved.metrics, e.generate(moved, max_new_tokens=2).metrics):
        assert metrics["bytes_sent"] == sum(metrics["bytes_by_kind"].values()) == sum(metrics["bytes_by_link"].values())


def answer_on_rank(me: Rank, requests: list[PrefillRequest]) -> tuple[list[int], list[int], dict[str, int]]:
    """Prefill, ask, decode two tokens, and go on both over the shards and on one host."""
    host = Host(HostSpec("tiny", "float32", "cpu"), me.transport, model())
    host._tokenizer = byte_tokenizer()
    reports = [host.prefill(requests[me.index]), host.generate("a", DecodeRequest(Autoregressive(), 2))]
    host.gather("a", "b", 0)
    reports.append(host.generate("a", DecodeRequest(Autoregressive(), 4, Sampling(temperature=1.0, seed=3))))
    moved = host.generate("b", DecodeRequest(Autoregressive(), 4, Sampling(temperature=1.0, seed=3)))
    assert reports[1].decoded is not None and reports[2].decoded is not None and moved.decoded is not None
    sent: Counter[str] = Counter()
    for report in reports:
        sent.update(report.bytes_by_kind)
    return reports[1].decoded.token_ids + reports[2].decoded.token_ids, moved.decoded.token_ids, dict(sent)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_answer_as_virtual_hosts_do(world: int) -> None:
    pool, e, p = shared_pool(world), engine(world), prompt()
    handle, plan = e.prefill(p), e.setup.plan(p)
    want = [
        *e.generate(handle, max_new_tokens=2).token_ids,
        *e.generate(handle, max_new_tokens=4, temperature=1.0, seed=3).token_ids,
    ]
    requests = [prefill_request("a", p, plan, e.setup.compressor, rank) for rank in range(world)]
    answers = pool.run(answer_on_rank, requests)
    total: Counter[str] = Counter()
    for tokens, moved, sent in answers:
        assert tokens == want and moved == want[2:]
        total.update(sent)
    assert total == bytes_by_kind(plan, 11, 6, 5)


# -- generating -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_generating_in_two_parts_equals_generating_at_once(options: dict[str, Any]) -> None:
    e = engine()
    whole, parts = e.prefill(prompt()), e.prefill(prompt())
    want = e.generate(whole, max_new_tokens=16, **options)
    got = [e.generate(parts, max_new_tokens=8, **options) for _ in range(2)]
    assert got[0].token_ids + got[1].token_ids == want.token_ids
    assert len(want.token_ids) == 16 and want.finish_reason == "length"
    assert parts.token_ids == whole.token_ids and whole.next_position == 150 + 11 + 16


def test_a_seed_decides_the_tokens_on_any_number_of_hosts() -> None:
    answers = {}
    for seed in (0, 1, 2**64 - 1):
        e = engine()
        sharded = e.prefill(prompt())
        alone = sharded.gather(2)
        options = {"max_new_tokens": 12, "temperature": 1.5, "seed": seed}
        answers[seed] = e.generate(sharded, **options).token_ids
        assert e.generate(alone, **options).token_ids == answers[seed]
    assert len(set(answers.values())) == 3


@pytest.mark.parametrize("hosts", [1, 4])
def test_a_stop_token_ends_the_ids_and_is_not_in_the_text(hosts: int) -> None:
    e = engine(hosts, "full" if hosts == 1 else "apb")
    free = e.generate(e.prefill(prompt()), max_new_tokens=8)
    stop = free.token_ids[3]
    at = free.token_ids.index(stop)
    e.stop_ids = (stop,)
    pieces: list[str] = []
    result = e.generate(e.prefill(prompt()), max_new_tokens=8, on_token=pieces.append)
    assert result.finish_reason == "stop"
    assert result.token_ids == free.token_ids[: at + 1]
    assert result.text == "".join(pieces) == decoded(free.token_ids[:at])


def test_stop_strings_end_the_text_before_them() -> None:
    e = engine()
    free = e.generate(e.prefill(prompt()), max_new_tokens=40, **SAMPLED)
    assert len(free.text) > 20 and free.text == decoded(free.token_ids)
    for start, length in ((5, 1), (7, 3), (9, 6)):  # longer ones lie across several tokens
        stop = free.text[start : start + length]
        pieces: list[str] = []
        result = e.generate(
            e.prefill(prompt()),
            max_new_tokens=40,
            stop=["never seen", stop],
            on_token=pieces.append,
            **SAMPLED,
        )
        assert result.text == "".join(pieces) == free.text[: free.text.index(stop)]
        assert result.finish_reason == "stop"
        assert result.token_ids == free.token_ids[: len(result.token_ids)]


def test_what_cannot_be_generated_is_refused() -> None:
    e = engine(compress="norm")
    bare, asked = e.prefill(prompt(question=False), chat=False), e.prefill(prompt())
    with pytest.raises(UserError, match="no question"):
        e.generate(bare)
    with pytest.raises(UserError, match="needs a question"):
        engine(compress="query").prefill(prompt(question=False))
    with pytest.raises(UserError, match="no logits"):
        bare.logits()
    for count in (0, -1, 1.5):
        with pytest.raises(UserError, match="nothing to generate"):
            e.generate(asked, max_new_tokens=count)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="neither text nor token ids"):
        e.prefill(["the", "sea"], "the hill?")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="longer than the model's context"):
        e.generate(asked, max_new_tokens=400 - 161 + 1)
    with pytest.raises(UserError, match="longer than the model's context"):
        e.prefill(prompt(context=390))
    with pytest.raises(UserError, match="longer than the model's context"):
        bare.fork(query=list(ids(251, 1)))
    for stop in ("", ["the", ""], [3]):
        with pytest.raises(UserError, match="stop string is empty, or no string"):
            e.generate(asked, stop=stop)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown decoder"):
        e.generate(asked, decode="beam")
    with pytest.raises(UserError, match="no such host"):
        asked.gather(HOSTS)
    with pytest.raises(UserError, match="empty"):
        bare.fork(query=[])
    outside = len(byte_tokenizer())
    for wrong_ids in ([outside], [3, -1]):
        with pytest.raises(UserError, match="outside the model's vocabulary"):
            bare.fork(query=wrong_ids)
        with pytest.raises(UserError, match="outside the model's vocabulary"):
            e.prefill(list(range(40)), wrong_ids, chat=False)
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        e.prefill(dataclasses.replace(prompt(), context_ids=(outside,) * 150))
    for name, values in {"temperature": [-0.1], "top_p": [0.0, 1.1], "top_k": [-1, 1.5], "seed": [-1, 0.5]}.items():
        for value in values:
            with pytest.raises(UserError, match=f"decode.{name}"):
                e.generate(asked, **{name: value})  # type: ignore[arg-type]
    e.generate(asked, max_new_tokens=1)  # none of that has hurt it
    with pytest.raises(UserError, match="no logits"):
        asked.logits()
    e.cluster.epoch += 1
    with pytest.raises(UserError, match="cache is gone"):
        e.generate(asked)


def test_a_group_of_heads_reads_its_keys_once() -> None:
    gen = torch.Generator().manual_seed(0)
    context = LayerKV(*(torch.randn(1, 2, 30, 16, generator=gen, dtype=torch.float64) for _ in range(2)))
    q, k, v = (torch.randn(1, heads, 3, 16, generator=gen, dtype=torch.float64) for heads in (6, 2, 2))
    shapes: list[tuple[int, ...]] = []

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(q.shape))
        return kernel("reference")(q, k, v, **options)

    kind = Full(6, 2, 16, 16)
    cache = HostCache((kind,), [FullCache(kind, context)], (0,), (((0, 30),),), 30)
    (t,) = VirtualWorld(1).transports
    got = CacheAttention(cache, t, recording, 30, 3)(AttentionCall(0, q, k, v, 0.25))  # type: ignore[arg-type]
    assert shapes == [(1, 2, 9, 16), (1, 6, 3, 16)], "the context without a mask, then the new tokens themselves"
    past = kernel("reference")(q, context.k_BKTD, context.v_BKTE, causal=False, scale=0.25)
    own = kernel("reference")(q, k, v, causal=True, scale=0.25)
    torch.testing.assert_close(got, merge([past, own])[0].transpose(1, 2), atol=1e-12, rtol=0)
