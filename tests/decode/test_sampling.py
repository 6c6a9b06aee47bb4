"""How tokens are chosen from logits, and how they become text as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from apb.decode.sampling import Sampling
from apb.decode.text import TextStream
from tests.support.tiny import byte_tokenizer


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.4},
        {"temperature": 1.7, "top_k": 5},
        {"temperature": 0.8, "top_p": 0.6},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.85},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_k": 1000},
    ],
)
def test_probabilities_are_those_of_transformers(options: dict[str, Any]) -> None:
    gen = torch.Generator().manual_seed(3)
    for _ in range(20):
        logits = torch.randn(50, generator=gen, dtype=torch.float64) * 3
        scores = TemperatureLogitsWarper(float(options["temperature"]))(None, logits[None])
        if "top_k" in options:
            scores = TopKLogitsWarper(options["top_k"])(None, scores)
        if "top_p" in options:
            scores = TopPLogitsWarper(options["top_p"])(None, scores)
        got = Sampling(**options).probabilities(logits)
        torch.testing.assert_close(got, scores[0].softmax(-1), atol=1e-12, rtol=1e-9)


def test_tokens_are_drawn_by_the_inverse_of_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, top_k=7, seed=5)
    gen = torch.Generator().manual_seed(4)
    seen = set()
    for position in range(300):
        logits = torch.randn(20, generator=gen)
        probabilities = sampling.probabilities(logits).tolist()
        u = np.random.Generator(np.random.Philox(key=5, counter=[position, 0, 0, 0])).random()
        want = next(i for i in range(20) if sum(probabilities[: i + 1]) > u)
        assert sampling.choose(logits, position) == want and probabilities[want] > 0
        seen.add(round(u, 6))
    assert len(seen) > 290  # another position, another number


def test_frequencies_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, seed=1)
    logits = torch.tensor([0.7, 0.2, 0.1, 0.0]).log()
    count = torch.zeros(4)
    for position in range(4000):
        count[sampling.choose(logits, position)] += 1
    assert ((count / 4000 - logits.exp()).abs() < 0.03).all() and count[3] == 0


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampling().choose(torch.tensor([0.0, 2.0, 2.0]), position=3) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-308, 1e-30])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_the_smallest_temperatures_are_greedy(temperature: float, options: dict[str, Any]) -> None:
    logits = torch.tensor([-3.0, 40.0, 39.9, -torch.inf])
    sampling = Sampling(temperature=temperature, **options)
    assert sampling.probabilities(logits).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert sampling.choose(logits, position=3) == 1
    tied = sampling.probabilities(torch.tensor([1.0, 7.0, 7.0]))
    assert not tied.isnan().any() and tied.sum() == 1


# -- text -----------------------------------------------------------------------------------------------


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """Push a text's tokens one by one until it stops; byte-level tokens split characters."""
    made = TextStream(byte_tokenizer(), stop)
    pieces = []
    for token in byte_tokenizer()(text, add_special_tokens=False)["input_ids"]:
        pieces.append(made.push(token))
        if made.stopped:
            break
    pieces.append(made.finish())
    return pieces, made


def test_characters_split_over_tokens_come_whole() -> None:
    text = "naïve 日本 👩‍🚀 ок"
    pieces, made = stream(text)
    assert "".join(pieces) == made.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 10  # as it comes, not all at the end


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    made = TextStream(byte_tokenizer())
    tokens = byte_tokenizer()("a日", add_special_tokens=False)["input_ids"]
    pieces = [made.push(token) for token in tokens[:-1]] + [made.finish()]
    assert "".join(pieces) == made.text and made.text.startswith("a\ufffd")


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("abcé日👩 \n"), max_size=40),
    stop=st.lists(st.text(st.sampled_from("abcé日"), min_size=1, max_size=4), max_size=3),
)
def test_any_text_comes_whole_and_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, made = stream(text, tuple(stop))
    want = text
    for end in range(len(text) + 1):  # character by character, the first stop string that is complete decides
        found = [at for s in stop if (at := text[:end].find(s)) >= 0]
        if found:
            want = text[: min(found)]
            break
    assert made.text == "".join(pieces) == want
    assert made.stopped == any(s in text for s in stop)


def cut_by_hand(ids: list[int], stop: list[str]) -> tuple[int, str]:
    """Return how many tokens come before an answer is stopped, and its text, decoding everything anew each time."""
    words = byte_tokenizer()
    for count in range(1, len(ids) + 1):
        whole = words.decode(ids[:count]).rstrip("\ufffd")
        found = [at for s in stop if (at := whole.find(s)) >= 0]
        if found:
            kept = whole[: min(found)]
            for special in ("<s>", "</s>"):  # a special token's beginning goes with it
                kept = kept.replace(special, "")
            return count, kept
    return len(ids), words.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "b", "é", "日", "👩", " ", "<s>", "</s>", "s>"]), max_size=12),
    stop=st.lists(st.sampled_from(["<s>", "</s>", "a<s>", "<s>b", "b</s><s>", "é", " a", "日"]), max_size=3),
)
def test_special_tokens_can_stop_an_answer(parts: list[str], stop: list[str]) -> None:
    words = byte_tokenizer()
    special = {"<s>": [0], "</s>": [1]}
    ids = [i for p in parts for i in special.get(p) or words(p, add_special_tokens=False)["input_ids"]]
    made, pieces, count = TextStream(words, stop), [], 0
    for token in ids:
        count += 1
        pieces.append(made.push(token))
        if made.stopped:
            break
    pieces.append(made.finish())
    assert (count, made.text) == cut_by_hand(ids, stop)
    assert "".join(pieces) == made.text


@pytest.mark.parametrize("most", [2, 4])
def test_a_stop_string_before_an_unfinished_character(most: int) -> None:
    """A space and two bytes of a quotation mark are one token of many vocabularies."""
    words = ["<pad>", "a", "b", "ĠâĢ", "ľ"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    made.decoder = decoders.ByteLevel()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>"), [" "])
    taken = []
    for token in [1, 3, 4, 2][:most]:
        taken.append(token)
        stream.push(token)
        if stream.stopped:
            break
    stream.finish()
    assert (taken, stream.stopped, stream.text) == ([1, 3], True, "a")


def test_bytes_of_a_character_that_are_tokens_of_their_own() -> None:
    """SentencePiece's byte tokens: half a character turns the whole run of bytes into replacement signs."""
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("a", -1.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    words = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    ids = words("aé日a", add_special_tokens=False)["input_ids"]
    stream = TextStream(words, ["日"])
    shown = [stream.push(token) for token in ids[:-2]]
    assert "".join(shown) == "aé" and not stream.stopped
    stream.push(ids[-2])
    assert stream.stopped and stream.text == "aé"
