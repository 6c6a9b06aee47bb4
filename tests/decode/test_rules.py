"""What generation_config.json asks of the choice of tokens: transformers' own, however tokens are decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from apb import Engine
from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.decode.rules import Past, Rules
from apb.engine.generation import generation_rules
from apb.prompt.prompt import Prompt, Question
from burst.errors import UserError
from tests.support.drafting import Oracle, engine, prompt
from tests.support.tiny import random_ids, saved_llama

VOCAB = 12
tokens = st.integers(0, VOCAB - 1)
some = st.lists(tokens, max_size=3, unique=True).map(tuple)


@settings(max_examples=80, deadline=None)
@given(
    history=st.lists(tokens, min_size=1, max_size=20),
    taken=st.lists(tokens, max_size=6),
    path=st.lists(tokens, max_size=4),
    rules=st.builds(
        Rules,
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
        no_repeat_ngram_size=st.integers(0, 4),
        bad_words_ids=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
        min_length=st.integers(0, 25),
        min_new_tokens=st.integers(0, 6),
        suppress_tokens=some,
        begin_suppress_tokens=some,
    ),
    stops=st.lists(tokens, min_size=1, max_size=2, unique=True),
    seed=st.integers(0, 1000),
)
def test_logits_are_changed_as_in_transformers(
    history: list[int], taken: list[int], path: list[int], rules: Rules, stops: list[int], seed: int
) -> None:
    eos, first = torch.tensor(stops), len(history)
    made = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)])
    if rules.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size))
    words = [list(word) for word in rules.bad_words_ids if not (len(word) == 1 and word[0] in stops)]
    if words:
        made.append(NoBadWordsLogitsProcessor(words, eos))
    made.append(MinLengthLogitsProcessor(rules.min_length, eos))
    made.append(MinNewTokensLengthLogitsProcessor(first, rules.min_new_tokens, eos))
    made.append(SuppressTokensLogitsProcessor(list(rules.suppress_tokens)))
    made.append(SuppressTokensAtBeginLogitsProcessor(list(rules.begin_suppress_tokens), first))
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    past = Past(rules, torch.tensor(history), stops)
    for token in taken:
        past.extend([token])
    want = made(torch.tensor([history + taken + path]), logits[None].clone())[0]
    assert torch.equal(past.ruled(logits, path), want)
    assert torch.equal(past.ruled(logits, path), want)  # a path is forgotten


RULED = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [5], "begin_suppress_tokens": [7], "bad_words_ids": [[9], [3, 4]]},
    {"min_new_tokens": 12, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved_llama(tmp_path_factory.mktemp("ruled")))


@pytest.mark.parametrize("values", RULED, ids=lambda v: "-".join(v))
def test_greedy_answers_are_those_of_transformers(folder: Path, values: dict[str, Any]) -> None:
    ids = random_ids(8, seed=3) * 4
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    free = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=None)[0, len(ids) :]
    # What is chosen without rules is banned in part, and the answer would stop early.
    values = {"eos_token_id": [int(free[4])]} | values
    if "suppress_tokens" in values:
        values |= {"suppress_tokens": [int(free[1])], "begin_suppress_tokens": [int(free[0])]}
        values |= {"bad_words_ids": [[int(free[3])], free[5:7].tolist()]}
    model.generation_config = GenerationConfig(**values)
    want = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24, pad_token_id=0)[0, len(ids) :]
    (folder / "generation_config.json").write_text(json.dumps(values))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": values["eos_token_id"]}))
    for hosts, strategy in ((1, "full"), (2, "ring")):
        with Engine.launch(str(folder), hosts=hosts, strategy=strategy, dtype="float64") as e:
            handle = e.prefill(Prompt(ids[:20], 2, Question(ids[20:22], ids[22:30], ids[30:], None)))
            for decode in ("autoregressive", Lookup(match=1)):
                got = e.generate(handle.fork(), max_new_tokens=24, decode=decode)
                assert list(got.token_ids) == want.tolist()
                rules = {name: value for name, value in values.items() if name != "eos_token_id"}
                assert json.loads(json.dumps(got.metrics["generation_rules"])) == rules
                assert got.metrics["generation_ignored"] == []


@pytest.mark.parametrize("options", [{}, {"temperature": 1.4, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("hosts", [1, 3])
def test_decoders_agree(hosts: int, options: dict[str, Any]) -> None:
    e = engine(hosts, "full" if hosts == 1 else "apb")
    free = e.generate(e.prefill(prompt()), max_new_tokens=12, **options).token_ids
    e.stop_ids = (free[5],)
    rules = Rules(1.3, 2, ((free[2], free[3]),), 0, 20, (free[1],), (free[0],))
    e._rules = (rules, ())
    handle = e.prefill(prompt())
    plain = handle.fork()
    want = e.generate(plain, max_new_tokens=30, **options).token_ids
    more = e.generate(plain, max_new_tokens=9, **options).token_ids
    assert want[:12] != free and len(want) >= 20
    decoders = [Oracle(want, handle.next_position, seed=1), Eagle2(depth=3, width=4, tokens=14), Lookup(match=1)]
    for made in decoders:
        fork = handle.fork()
        got = e.generate(fork, max_new_tokens=30, decode=made, **options)
        assert got.token_ids == want
        if not isinstance(made, Oracle):
            assert e.generate(fork, max_new_tokens=9, decode=made, **options).token_ids == more


def test_where_rules_stand_and_what_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert generation_rules(tmp_path) == (Rules(), ())
    nested = {"repetition_penalty": 1.2, "text_config": {"min_length": 3, "repetition_penalty": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert generation_rules(tmp_path) == (Rules(repetition_penalty=1.2, min_length=3), ())
    values = {"temperature": 0.6, "do_sample": True, "num_beams": 4, "sequence_bias": [[[1], 2.0]], "guidance_scale": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(values | {"suppress_tokens": None}))
    assert generation_rules(tmp_path) == (Rules(), ("num_beams", "sequence_bias"))
    saved_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with Engine.launch(str(tmp_path), hosts=1, strategy="full") as e:
        got = e.generate(e.prefill("a b", "c"), max_new_tokens=2)
    assert got.metrics["generation_ignored"] == ["num_beams", "sequence_bias"]
    assert "num_beams, sequence_bias" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0),
        ("repetition_penalty", "much"),
        ("repetition_penalty", True),
        ("no_repeat_ngram_size", 2.5),
        ("no_repeat_ngram_size", -1),
        ("suppress_tokens", ["a"]),
        ("suppress_tokens", {"a": 1}),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [3]),
        ("min_new_tokens", [1]),
    ],
)
def test_values_that_cannot_be_followed_are_the_files_damage(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(UserError, match=f"generation_config.json is damaged: {name} is"):
        generation_rules(tmp_path)
