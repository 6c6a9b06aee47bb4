"""Samples of the fidelity benchmark: what is asked, RULER's own files, and scores."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from bench.ruler import TASKS, sample
from bench.ruler.base import Ask, mix
from bench.ruler.official import read
from bench.ruler.prompts import prompt, target
from bench.ruler.scoring import accuracy
from burst.errors import UserError
from tests.support.tiny import byte_tokenizer

LENGTH = 6000  # tokens of a byte-level tokenizer: some 1,500 of a usual one
WORDS = byte_tokenizer()


# -- samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_exactly_the_tokens_asked_for(task: str) -> None:
    for tokens in (LENGTH, LENGTH + 1):
        made = sample(WORDS, task, tokens, "report", 0)
        assert len(prompt(WORDS, made).token_ids) == tokens
        assert made == sample(WORDS, task, tokens, "report", 0)
        assert made.document != sample(WORDS, task, tokens, "choose", 0).document
    assert target(WORDS, made.ask)


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("perplexity", "vt_1hop")])
def test_answers_stand_in_the_document_and_the_question_does_not_give_them_away(task: str) -> None:
    made = sample(WORDS, task, LENGTH, "report", 3)
    document = WORDS.decode(made.document)
    for ask in filter(None, (made.ask, made.second)):
        assert all(answer in document for answer in ask.answers)
        assert not any(answer in ask.question + ask.prefix for answer in ask.answers)
        assert accuracy(ask, ask.prefix + ask.target) == 1.0
    if made.second is not None:
        assert set(made.second.answers).isdisjoint(made.ask.answers) or task == "reading"
        assert made.second.question != made.ask.question


def test_needles_stand_as_often_as_they_should() -> None:
    for task, values in (("niah_multikey_1", 4), ("niah_multivalue", 4), ("niah_multiquery", 5), ("niah_single_3", 1)):
        text = WORDS.decode(sample(WORDS, task, LENGTH, "report", 1).document)
        assert len(re.findall(r"One of the special magic \w+ for [\w-]+ is: [\w-]+\.", text)) == values
    many = WORDS.decode(sample(WORDS, "niah_multikey_3", LENGTH, "report", 1).document)
    assert len(re.findall(r"special magic uuids for [\w-]{36} is: [\w-]{36}\.", many)) > 20


def test_chains_are_assigned_in_order() -> None:
    for task, chains, hops in (("vt", 1, 4), ("vt_1hop", 2, 1)):
        made = sample(WORDS, task, LENGTH, "report", 2)
        value: dict[str, str] = {}
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", WORDS.decode(made.document)):
            value[name] = value.get(given, given)  # a copy before its source would leave a name here
        assert len(value) == chains * (hops + 1) and all(v.isdigit() for v in value.values())
        held = re.findall(r"\d+|[A-Z]{3,}", made.ask.question)[-1]
        want = {n for n, v in value.items() if v == held} if task == "vt" else {value[held]}
        assert set(made.ask.answers) == want


def test_counted_words_are_the_most_frequent() -> None:
    for task, pattern, skip in (("cwe", r"\d+\. ([a-z-]+)", 0), ("fwe", r" ([a-z]{6})(?= )", 0)):
        made = sample(WORDS, task, LENGTH, "report", 4)
        text = WORDS.decode(made.document).split("\n", 1)[1]
        words = re.findall(pattern, text)
        counts = sorted(((words.count(w), w) for w in set(words)), reverse=True)
        top = counts[skip : skip + len(made.ask.answers)]
        assert {w for _, w in top} == set(made.ask.answers)
        assert top[-1][0] > counts[len(made.ask.answers)][0]


def test_a_task_that_does_not_fit_is_refused() -> None:
    for task, tokens in (("niah_multikey_1", 400), ("cwe", 900), ("fwe", 400)):
        with pytest.raises(UserError, match="does not fit"):
            sample(WORDS, task, tokens, "report", 0)
    with pytest.raises(UserError, match="does not fit"):
        sample(WORDS, "reading", 100, "report", 0)
    with pytest.raises(UserError, match="unknown task"):
        sample(WORDS, "niah_singel_1", LENGTH, "report", 0)


def test_mixing_keeps_the_order_of_what_is_planted() -> None:
    for seed in range(20):
        got = mix([1], [[2, 2], [3]], ([4, 5, 6] for _ in range(99)), 30, random.Random(seed), shuffle=False)
        assert len(got) == 30 and got[0] == 1 and [x for x in got if x in (2, 3)] == [2, 2, 3]


def test_the_question_can_stand_first_as_well() -> None:
    made = sample(WORDS, "reading", LENGTH, "report", 0)
    last, first = prompt(WORDS, made), prompt(WORDS, made, question_first=True)
    assert first.question == last.question and first.question is not None
    start = first.head + first.copied
    assert first.context_ids[start:] == last.context_ids[last.head :] == made.document and first.head == last.head
    between = WORDS.decode(first.context_ids[first.head : start])
    assert between == f"{made.ask.question}\n\n"
    assert WORDS.decode(first.question.query_ids) == f"\n\n{made.ask.question}\nbot:{made.ask.prefix}"


# -- RULER's own files and scores -------------------------------------------------------------------------


def test_official_files_are_read(tmp_path: Path) -> None:
    rows = {
        "niah_single_1": ("Text.\nA needle: 7.\nWhat is the magic number? The magic number is", ["7"], None, "all"),
        "vt": ("X\nQuestion: old? Answer: A\n\nY\nQuestion: Find all. Answer: they are: ", ["A", "B"], None, "all"),
        "qa_1": ("Doc 1.\n\nQuestion: Who? Answer:", ["He", "Him"], " Answer:", "part"),
    }
    for task, (text, outputs, prefix, _) in rows.items():
        (tmp_path / task).mkdir()
        row = {"index": 0, "input": text, "outputs": outputs, "length": 9} | (
            {"answer_prefix": prefix} if prefix else {}
        )
        (tmp_path / task / "validation.jsonl").write_text(json.dumps(row) + "\n\n")
    got = {s.task: s for s in read(WORDS, tmp_path)}
    assert set(got) == set(rows)
    for task, (text, outputs, _, match) in rows.items():
        assert got[task].ask.answers == tuple(outputs) and got[task].ask.match == match
        assert text.startswith(WORDS.decode(got[task].document))
    niah, vt, qa = (got[t] for t in rows)
    assert (WORDS.decode(niah.document), niah.ask.question) == ("Text.\nA needle: 7.", "What is the magic number?")
    assert niah.ask.prefix == "The magic number is"
    assert (vt.ask.question, vt.ask.prefix) == ("Question: Find all.", "Answer: they are:")
    assert WORDS.decode(vt.document).endswith("Y")
    assert (qa.ask.question, qa.ask.prefix) == ("Question: Who?", "Answer:")


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"input": "no mark", "outputs": ["a"]}', '{"input": "\\nWhat ?", "outputs": []}']
)
def test_lines_that_are_no_samples_are_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "niah_single_1.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match="not a RULER sample") as error:
        list(read(WORDS, file))
    assert "line 1" in str(error.value.given)
    with pytest.raises(UserError, match="no RULER samples there"):
        list(read(WORDS, tmp_path / "missing"))


def test_scores_are_rulers() -> None:
    every, one = Ask("", "", ("alpha", "Beta")), Ask("", "", ("alpha", "Beta"), match="part")
    for text, share, any_one in (("ALPHA and beta", 1.0, 1.0), ("only Alphabet", 0.5, 1.0), ("none", 0.0, 0.0)):
        assert accuracy(every, text) == share and accuracy(one, text) == any_one
