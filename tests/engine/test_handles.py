"""What a prefill returns: forks with other questions, where tokens lie, and caches that are gone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from apb.engine.metrics import measured
from apb.host.messages import HostReport
from apb.strategies import strategy
from burst.errors import UserError
from tests.support.asking import HOSTS, SAMPLED, decoded, engine, ids, prompt
from tests.support.families import adapt_family
from tests.support.tiny import tiny_engine

# -- forks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["apb", "spava", "star"])
def test_asking_later_equals_asking_an_unconditioned_cache_afresh(name: str) -> None:
    e = engine(name=name, compress="norm")
    first, second = list(ids(5, 11)), list(ids(9, 12))
    bare = e.prefill(prompt(question=False), chat=False)
    assert bare.conditioned_on is None
    a, b = bare.fork(query=first), bare.fork(query=second)
    answer = e.generate(a, max_new_tokens=5).token_ids
    for handle, query in ((a.fork(query=second), second), (b.fork(query=first), first)):
        fresh = e.prefill(prompt(question=False), chat=False).fork(query=query)
        torch.testing.assert_close(handle.logits(), fresh.logits(), atol=0, rtol=0)
        assert handle.token_ids == prompt(False).context_ids + tuple(query)
    assert a.generated == list(answer)
    assert e.generate(bare.fork(query=first), max_new_tokens=5).token_ids == answer


def test_a_fork_of_a_conditioned_cache_keeps_saying_so() -> None:
    e, p = engine(), prompt()
    handle = e.prefill(p, chat=False)
    assert p.question is not None
    assert handle.conditioned_on == p.question.ids
    other = handle.fork(query=list(ids(4, 13)))
    result = e.generate(other, max_new_tokens=2)
    assert result.metrics["conditioned_on"] == p.question.ids and result.metrics["forked"]
    assert result.metrics["query_tokens"] == 4


def test_a_fork_without_a_query_goes_its_own_way_from_here() -> None:
    e = engine()
    parent = e.prefill(prompt())
    e.generate(parent, max_new_tokens=4)
    twins = [parent.fork() for _ in range(2)]
    for cost in ("prefill_s", "request_s", "bytes_by_kind"):  # the prefill's, not the copying's
        assert twins[0].metrics[cost] == parent.metrics[cost]
    want = e.generate(twins[0], max_new_tokens=8, **SAMPLED).token_ids
    assert len(parent.generated) == 4
    assert e.generate(twins[1], max_new_tokens=8, **SAMPLED).token_ids == want
    assert e.generate(parent, max_new_tokens=8, **SAMPLED).token_ids == want
    e.release(twins[0])
    assert e.generate(parent, max_new_tokens=1).token_ids


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("ready", [True, False], ids=["prompt", "text"])
def test_a_later_question_is_put_as_the_first_one_was(chat: bool, ready: bool) -> None:
    e = engine()
    made = e.setup.prompt("the sea and the stars", "the king?", chat=chat)
    handle = e.prefill(made) if ready else e.prefill("the sea and the stars", "the king?", chat=chat)
    asked = handle.fork(query="the hill?").prompt.question
    assert asked is not None
    assert decoded(asked.query_ids) == ("\n\nthe hill?\nbot:" if chat else "\n\nthe hill?")
    with pytest.raises(UserError, match="its own question"):
        e.prefill(made, "the hill?")


# -- where they lie, and whether they still do ------------------------------------------------------------


def test_caches_of_another_engine_or_released_are_refused() -> None:
    e, other = engine(), engine()
    mine, theirs = e.prefill(prompt()), other.prefill(prompt())
    assert mine.id == theirs.id
    copy = mine.fork()
    mine.release()
    mine.release()
    theirs.release()
    for call in (mine.logits, mine.fork, mine.gather, lambda: e.generate(theirs), lambda: other.generate(copy)):
        with pytest.raises(UserError, match="not on the engine's hosts"):
            call()
    assert [len(e.cluster.host(r)._caches) for r in range(HOSTS)] == [1] * HOSTS
    e.close()
    e.close()
    for closed in (lambda: e.generate(copy), lambda: e.prefill(prompt())):
        with pytest.raises(UserError, match="engine is closed"):
            closed()
    copy.release()


def test_the_handle_knows_where_every_position_lies() -> None:
    e = engine()
    handle = e.prefill(prompt())
    lengths = [length for _, length in handle.blocks]
    assert lengths == [38, 38, 37, 37]
    want = [(h, i) for h, length in enumerate(lengths) for i in range(length)]
    want += [(3, 37 + i) for i in range(11)]
    for generated, cached in ((0, 161), (3, 163), (1, 164)):  # the last token's KV comes with the next one
        if generated:
            e.generate(handle, max_new_tokens=generated)
            want += [(3, i) for i in range(len(want) - 113, cached - 113)]
        assert [handle.locate(p) for p in range(cached)] == want
        held = Counter(host for host, _ in want)
        for rank in range(HOSTS):  # what the hosts really hold
            cache = e.cluster.host(rank)._caches[handle.id]
            assert len(cache.layers[0].context) + len(cache.layers[0].tail or ()) == held[rank]
        for position in (-1, cached, handle.next_position):
            with pytest.raises(UserError, match="no such position"):
                handle.locate(position)
    assert handle.next_position == 165 and e.generate(handle.fork(), max_new_tokens=1).token_ids


def test_a_host_that_waits_for_others_does_not_lengthen_the_questions_pass() -> None:
    early, late = (HostReport(3.0, 10.0, {}, {}, 0, 0, query_s=own) for own in (5.0, 0.4))
    found = measured([early, late], 10.1)
    assert (found["prefill_s"], found["query_s"]) == (10.0, 0.4)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5"])
def test_what_only_a_caches_hosts_keep_cannot_be_gathered_elsewhere(family: str) -> None:
    e = tiny_engine(adapt_family(family), strategy("ring"), 3)
    handle = e.prefill(prompt())
    gathered = handle.gather(1)
    again = gathered.gather(1)
    want = e.generate(handle, max_new_tokens=4).token_ids
    with pytest.raises(UserError, match="only the hosts of this cache keep its layers of the kind") as refused:
        gathered.gather(2)
    assert refused.value.allowed.startswith("rank=1")
    for each in (gathered, again):
        assert e.generate(each, max_new_tokens=4).token_ids == want
