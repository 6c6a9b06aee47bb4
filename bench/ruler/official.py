"""Samples from RULER's own JSONL files: fields ``input``, ``outputs`` and, in later versions, ``answer_prefix``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.ruler.base import Ask, Match, RulerSample, encoder
from burst.errors import UserError

# RULER puts its question on a line of its own that begins with one of these.
_MARKS = ("\nQuestion:", "\nWhat ")
_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # by task, as RULER decodes


def read(tokenizer: Any, path: Path) -> Iterator[RulerSample]:
    """Return the samples of a file ``TASK/validation.jsonl`` or ``TASK.jsonl``, or of all files in a folder.

    Raises UserError for a path without such files and for lines that are no RULER samples.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise UserError(
            "no RULER samples there",
            given=str(path),
            allowed="a JSONL file, or a folder with some",
            remedy="Give bench.data the file or folder that RULER's prepare.py wrote.",
        )
    for file in files:
        task = file.parent.name if file.stem in ("validation", "test", "train") else file.stem
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                yield _sample(tokenizer, task, line, f"{file}, line {number}")


def _sample(tokenizer: Any, task: str, line: str, where: str) -> RulerSample:
    try:
        row = json.loads(line)
        text, outputs = row["input"], tuple(str(o) for o in row["outputs"])
        prefix = str(row.get("answer_prefix", ""))
        at = max(text.rindex(mark) for mark in _MARKS if mark in text)
        if not outputs:
            raise ValueError("no outputs")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "this line is not a RULER sample",
            given=where,
            allowed="input with its question on a line that begins 'Question:' or 'What', and outputs",
            remedy="Write the samples with RULER's base template (--model_template_type base).",
        ) from error
    question = text[at + 1 :]
    if prefix and question.endswith(prefix):
        question = question[: -len(prefix)]
    elif not prefix:  # earlier versions end the input with it
        question, prefix = _split_prefix(question)
    kind = task.split("_")[0]
    match: Match = "part" if kind == "qa" else "all"
    ask = Ask(question.strip(), prefix.strip(), outputs, match, _NEW_TOKENS.get(kind, 128))
    return RulerSample(task, where, tuple(encoder(tokenizer)(text[:at])), ask)


def _split_prefix(question: str) -> tuple[str, str]:
    """Part question and answer's beginning: at ``Answer:``, else after the question mark."""
    head, found, tail = question.partition("Answer:")
    if found:
        return head, found + tail
    head, found, tail = question.partition("?")
    return head + found, tail
