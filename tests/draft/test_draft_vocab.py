"""Draft vocabularies: counting, ranking, lists on disk, bitmaps, and the vocabulary adapted to a prompt."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.draft import vocab
from apb.draft.spec import DraftSpec
from apb.prompt.prompt import encode
from apb.train.frequency import count_text, stop_tokens
from burst.errors import UserError
from tests.plan.test_plans import SHAPE
from tests.support.tiny import byte_tokenizer

WHOLE = 50
ids = st.lists(st.integers(0, WHOLE - 1), max_size=60)


@settings(max_examples=40)
@given(st.lists(ids, max_size=4), st.sets(st.integers(0, WHOLE - 1), max_size=3))
def test_ranks_are_those_of_a_counter(texts: list[list[int]], stops: set[int]) -> None:
    counts = vocab.count((torch.tensor(t, dtype=torch.int32) for t in texts), WHOLE)
    counter = Counter(i for t in texts for i in t)
    assert counts.tolist() == [counter[i] for i in range(WHOLE)]
    ranked = vocab.rank(counts, sorted(stops)).tolist()
    assert sorted(ranked) == list(range(WHOLE)) and set(ranked[: len(stops)]) == stops
    rest = ranked[len(stops) :]
    assert rest == sorted(rest, key=lambda i: (-counter[i], i))
    top = torch.tensor(ranked[:10])
    total = sum(counter.values())
    assert vocab.coverage(counts, top) == pytest.approx(sum(counter[i] for i in top.tolist()) / max(1, total))


@settings(max_examples=40)
@given(ids, ids, st.integers(1, 80))
def test_bitmaps_join_by_or(one: list[int], other: list[int], whole: int) -> None:
    one, other = [i % whole for i in one], [i % whole for i in other]
    joined = vocab.bitmap(one, whole) | vocab.bitmap(other, whole)
    assert joined.dtype == torch.uint8 and len(joined) == -(-whole // 8)
    assert vocab.from_bitmap(joined, whole).tolist() == sorted({*one, *other})


@settings(max_examples=40)
@given(st.permutations(range(WHOLE)), ids, st.integers(3, WHOLE), st.integers(0, WHOLE))
def test_adapted_vocabularies_trade_the_rarest_for_the_prompts(
    ranked: list[int], prompt: list[int], size: int, listed: int
) -> None:
    listed, stops = max(size, listed), (4, 9)
    found = vocab.adapt(torch.tensor(ranked[:listed]), vocab.bitmap(prompt, WHOLE), size, WHOLE, stops).tolist()
    assert len(found) == len(set(found)) == size and set(stops) <= set(found)
    wanted = {*prompt, *stops}
    if len(wanted) <= size:
        assert wanted <= set(found)
        left = [i for i in ranked[:listed] if i not in wanted]
        assert set(found) - wanted == set(left[: size - len(wanted)])  # the most frequent of the others
    else:
        assert set(found) <= wanted


def test_a_prompt_within_the_list_changes_nothing() -> None:
    ranked = torch.arange(WHOLE)
    assert sorted(vocab.adapt(ranked, vocab.bitmap([3, 5], WHOLE), 20, WHOLE, (0,)).tolist()) == list(range(20))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_lists_come_back(tmp_path: Path, suffix: str) -> None:
    ranked = torch.tensor([7, 0, 49, 3])
    vocab.save(tmp_path / f"freq_4.{suffix}", ranked)
    assert vocab.load(tmp_path / f"freq_4.{suffix}", WHOLE, (3, 7)).tolist() == ranked.tolist()
    if suffix == "pt":  # as published: a plain list of ints
        assert torch.load(tmp_path / "freq_4.pt", weights_only=True) == [7, 0, 49, 3]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([1, 2, 2], "twice"),
        ([1, 2, WHOLE], "id 50"),
        ([1, -2], "id -2"),
        ([2, 3], "stop token"),
        ([], "is empty"),
        ([1, "2"], "no list of token ids"),
        ([1, True], "no list of token ids"),
        ({"a": 1}, "no list of token ids"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, bad: object, words: str) -> None:
    torch.save(bad, tmp_path / "freq.pt")
    with pytest.raises(UserError) as refused:
        vocab.load(tmp_path / "freq.pt", WHOLE, (1,))
    assert words in f"{refused.value} {refused.value.given}"


def test_a_list_that_is_cut_before_its_stop_token_is_refused(tmp_path: Path) -> None:
    torch.save([5, 6, 7, 2], tmp_path / "freq.pt")
    shape = dataclasses.replace(SHAPE, hidden=576, vocab=49152)
    spec = DraftSpec("smollm2-135m", vocab=4, frequency=str(tmp_path / "freq.pt"))
    assert spec.handoff(shape, (2,)).adapted_bytes == 4 * 576 * 4
    with pytest.raises(UserError, match="cut to 3 ids lacks a stop token"):
        dataclasses.replace(spec, vocab=3).handoff(shape, (2,))


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match="frequency list"):
            vocab.load(tmp_path / name, WHOLE, ())
    with pytest.raises(UserError, match="cannot be read"):
        vocab.load(tmp_path / "nowhere.pt", WHOLE, ())


def test_text_is_counted_as_it_is_tokenised() -> None:
    tokenizer = byte_tokenizer()
    text = "the king of the hill\nsees the sea\n" * 4000  # several pieces
    counts = count_text(tokenizer, text, 300, lambda done, of: None)
    once = Counter(encode(tokenizer, "the king of the hill\nsees the sea\n", special=False))
    assert counts.tolist() == [4000 * once[i] for i in range(300)]


def test_the_end_of_the_assistants_turn_is_a_stop_token() -> None:
    tokenizer = byte_tokenizer()
    assert stop_tokens(tokenizer, (5, 1)) == (5, 1)  # its template ends a turn with a line break, no special token
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>\n{% endfor %}"
        ending = tokenizer.convert_tokens_to_ids("</s>")
        assert stop_tokens(tokenizer, (5,)) == (5, ending)
    finally:
        tokenizer.chat_template = template
