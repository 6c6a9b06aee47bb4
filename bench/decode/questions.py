"""Prompts to decode from: held-out questions of some kinds, alone or behind a long document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb.prompt.conversation import make_conversation
from apb.prompt.prompt import Prompt, Question, make_prompt
from apb.train.questions import KINDS, Questions
from bench.tools.prose import prose
from burst.errors import UserError, choose

FIELDS = ("question", "prompt")  # of JSONL files, GSM8K's and HumanEval's
READ = "\n\nThat text was only to read. Now something else. "
SEED = 0


@dataclass(frozen=True)
class Asked:
    """A question with ``context`` tokens of prose before it."""

    kind: str
    number: int
    context: int
    text: str

    @property
    def key(self) -> str:
        """The question's key among others."""
        return f"{self.kind}/{self.context}/{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    def prompt(self, tokenizer: Any) -> Prompt:
        """Return the prompt in the chat template."""
        if not self.context:  # every prefill has a context: all of the question but its last token
            made = make_conversation(tokenizer, [{"role": "user", "content": self.text}])
            assert made.question is not None
            ids, tail = made.token_ids, made.question.after
            last = len(ids) - len(tail) - 1
            return Prompt(ids[:last], made.head, Question((), ids[last : last + 1], tail, None), chat=True)
        ids = tokenizer(prose(), add_special_tokens=False)["input_ids"]
        if len(ids) < self.context:
            raise UserError(
                "there is not that much prose",
                given=f"bench.contexts has {self.context}",
                allowed=f"up to {len(ids)} tokens of Python's language reference",
                remedy="Shorten bench.contexts.",
            )
        start = 997 * self.number % max(1, len(ids) - self.context)
        return make_prompt(tokenizer, tuple(ids[start : start + self.context]), READ + self.text, chat=True)


def questions(kinds: Sequence[str], count: int, contexts: Sequence[int], data: str | None) -> list[Asked]:
    """Return all questions. Raises UserError for unknown kinds and files without any."""
    found = []
    if data is not None:
        file = Path(data).expanduser()
        texts = {file.stem: _read(file)[:count]}
    else:
        made = Questions("", SEED)
        texts = {}
        for kind in kinds:
            choose("kind of questions", kind, (*KINDS, "free"))
            if kind == "free":
                texts[kind] = [q.text for q in made.free()[:count]]
            else:
                whole = (q for i in range(20 * count) if not (q := made.question(i, kind, held_out=True)).open)
                texts[kind] = list(dict.fromkeys(q.text for q in whole))[:count]
    for context in contexts:
        found += [Asked(kind, i, context, text) for kind, some in texts.items() for i, text in enumerate(some)]
    return found


def _read(file: Path) -> list[str]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise _unreadable(file, str(error)) from error
    texts = [str(row[key]) for row in rows if isinstance(row, dict) for key in FIELDS if key in row]
    if not texts:
        raise _unreadable(file, f"no line has {' or '.join(FIELDS)}")
    return texts


def _unreadable(file: Path, why: str) -> UserError:
    return UserError(
        f"no questions could be read from {file}",
        given=why,
        allowed=f"JSON lines, each with a field {' or '.join(FIELDS)}",
        remedy="Change bench.data.",
    )
