"""Asking the frozen model: questions become prompts, those that only begin are finished by the model, then answered."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apb.models.adapter import Adapter
from apb.prompt.prompt import encode, template
from apb.train import features
from apb.train.answers import KEPT, Answer, answer
from apb.train.questions import AskedQuestion

_INVENTED = 40  # tokens of a question that the model finishes, at most
_DARING = 0.9  # temperature of invented questions: they are to be many and different


class Interview:
    """Prompts in the model's chat template, or plain text where it has none; ``longest`` is an answer's in tokens."""

    def __init__(self, adapter: Adapter, tokenizer: Any, stop_ids: Sequence[int], longest: int) -> None:
        self._adapter, self._tokenizer, self._stop_ids, self._longest = adapter, tokenizer, stop_ids, longest
        self.chat = bool(getattr(tokenizer, "chat_template", None))

    def prompt(self, question: str) -> tuple[int, ...]:
        """Return the prompt that asks this."""
        head, tail = self._frame
        return (*head, *self.encode(question), *tail)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return a text's tokens."""
        return encode(self._tokenizer, text, special=False)

    def finish(self, questions: Sequence[AskedQuestion], seed: int) -> list[str]:
        """Return the questions' texts; the model, as the user, finishes those that only begin."""
        texts = [q.text for q in questions]
        begun = [i for i, q in enumerate(questions) if q.open]
        if begun:
            head, _ = self._frame
            prompts = [(*head, *self.encode(texts[i])) for i in begun]
            ends = self._answer([p or (0,) for p in prompts], [_DARING] * len(begun), _INVENTED, seed, False)
            for i, end in zip(begun, ends, strict=True):
                ids = end.ids[end.prompt : len(end.ids) - end.ended]
                texts[i] = (texts[i] + self._tokenizer.decode(ids)).strip() or "Hello"
        return texts

    def ask(
        self,
        questions: Sequence[str],
        temperatures: Sequence[float],
        seed: int,
        passage: Sequence[int] = (),
        kept: int = KEPT,
    ) -> list[Answer]:
        """Return an answer, with features, to each question; every one stands behind the ``passage``'s tokens, of which
        answers keep ``kept``, the template's before them included."""
        if not passage:
            return self._answer([self.prompt(q) for q in questions], temperatures, self._longest, seed, True)
        head, tail = self._frame
        rest = [(*self.encode(f"\n\n{q}"), *tail) for q in questions]
        return self._answer(rest, temperatures, self._longest, seed, True, (*head, *passage), kept)

    def hidden(self, passage: Sequence[int], kept: int) -> int:
        """Return how many of the tokens before a question its answer does not keep."""
        return max(0, len(self._frame[0]) + len(passage) - kept)

    def write(
        self,
        file: Path,
        questions: Sequence[AskedQuestion],
        temperatures: Sequence[float],
        seed: int,
        passage: Sequence[int] = (),
        kept: int = KEPT,
    ) -> None:
        """Ask questions and keep prompts, answers and features in a file."""
        texts = self.finish(questions, seed)
        features.write(file, self.ask(texts, temperatures, seed, passage, kept), [q.kind for q in questions], texts)

    def _answer(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        longest: int,
        seed: int,
        with_features: bool,
        before: Sequence[int] = (),
        kept: int = KEPT,
    ) -> list[Answer]:
        return answer(
            self._adapter,
            prompts,
            temperatures,
            longest=longest,
            stop_ids=self._stop_ids,
            seed=seed,
            features=with_features,
            before=before,
            kept=kept,
        )

    @functools.cached_property
    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The template before and after what the user says."""
        head, between, tail = template(self._tokenizer, self.chat)
        return encode(self._tokenizer, head, special=True), encode(self._tokenizer, tail or between, special=True)
