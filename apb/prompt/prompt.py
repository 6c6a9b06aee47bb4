"""A prompt in its parts: template head, document, question, template tail, with the tokens of the whole."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apb.plan.shapes import PromptLengths
from apb.prompt.encoding import Tokens, call
from apb.prompt.later import Ending, ending, follow
from apb.prompt.template import Piece, check_text, pieces
from apb.prompt.tokens import tokenise
from burst.errors import UserError

Text = str | Sequence[int]  # text, or token ids as they are

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Question:
    """A question as it runs in the query phase: separator and question text, then the template's tail."""

    before: tuple[int, ...]  # between document and question
    ids: tuple[int, ...]  # the question's own text: what anchors embed
    after: tuple[int, ...]  # template tail
    text: str | None  # None when ids were given

    @property
    def query_ids(self) -> tuple[int, ...]:
        """Every token of the query phase."""
        return (*self.before, *self.ids, *self.after)


@dataclass(frozen=True)
class Prompt:
    """A context, template head included, and the question that is asked about it (None: an unconditioned prefill)."""

    context_ids: tuple[int, ...]
    head: int  # tokens before the document's own text
    question: Question | None
    chat: bool = False  # whether it stands in the chat template: a later question then does, too
    copied: int = 0  # tokens of the question's copy between head and document, its separator included
    ending: Ending | None = field(default=None, compare=False, repr=False)  # for later questions; None: ids were given

    @property
    def lengths(self) -> PromptLengths:
        """Token counts for the plan."""
        q = self.question
        return PromptLengths(
            context=len(self.context_ids),
            head=self.head,
            question=len(q.ids) if q else 0,
            query=len(q.query_ids) if q else 0,
            copied=self.copied,
        )

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The whole prompt."""
        return self.context_ids + (self.question.query_ids if self.question else ())


def make_prompt(tokenizer: Any, context: Text, query: Text | None, *, chat: bool) -> Prompt:
    """Tokenise a prompt; raises UserError for an empty document or question, or a template that cannot be split.

    With ``chat`` both stand in one user message of the tokenizer's chat template; without, the document follows the
    tokenizer's BOS (if it adds one; ids are taken as they are) and nothing follows the question. Texts have the tokens
    of the whole prompt. Without a question, a last token of the document that a question would change is left to it.
    """
    if not isinstance(context, str):
        document = _ids(context, "document")
        head = tokenise(tokenizer, _frame(tokenizer, "D", "Q", chat)[0]).ids
        question = None if query is None else make_question(tokenizer, query, chat=chat)
        return Prompt((*head, *document), len(head), question, chat)
    _check(context, "document")
    if isinstance(query, str):
        _check(query, "question")
    first, last, rest = _frame(tokenizer, context, query if isinstance(query, str) else "Q", chat)
    whole = [*first, *last, *rest]
    end = len(first) + len(last)
    tokens = tokenise(tokenizer, whole)
    bos = () if chat else _bos(tokenizer)
    head, ids = tokens.part(0, len(first)), tokens.part(0, end)
    if len(ids) == len(head):
        raise _empty("document")
    blank = ""
    if context != context.rstrip() and chat:  # as the template writes it
        blank = _gap(rest).removesuffix(_gap(_frame(tokenizer, "D", query if isinstance(query, str) else "Q", chat)[2]))
    made = Prompt((*bos, *ids), len(bos) + len(head), None, chat, ending=ending(tokenizer, whole, end, tokens, blank))
    if query is None:
        return made
    if not isinstance(query, str):
        return replace(made, question=make_question(tokenizer, query, chat=chat, after=made))
    return replace(made, question=asked(tokens, whole, end, query))


def with_question_first(tokenizer: Any, prompt: Prompt) -> Prompt:
    """Return the prompt with a copy of its question between head and document, and a separator if it is text.

    Every strategy's hosts then read the document knowing the question, and the copy stays in the KV cache. Raises
    UserError for a prompt without a question, with a copy already, or that closes a turn after its document instead of
    asking (its question came before), and without a tokenizer where there is a separator.
    """
    question, wrong = prompt.question, None
    if question is None:
        wrong = "no question"
    elif prompt.copied:
        wrong = "a prompt that has it there"
    elif prompt.chat and question.text is None and not question.before:
        wrong = "a prompt with nothing but the template's own text behind the document"
    elif tokenizer is None and (prompt.chat or question.text is not None):
        wrong = "random weights, which read no text"
    if question is None or wrong is not None:
        raise UserError(
            "no question can be put before this document",
            given=wrong,
            allowed="a question behind the document, and the model's tokenizer",
            remedy="Leave question_first out, or give a question.",
        )
    text = prompt.chat or question.text is not None
    copy = (*question.ids, *(separator(tokenizer) if text else ()))
    ids = prompt.context_ids[: prompt.head] + copy + prompt.context_ids[prompt.head :]
    return replace(prompt, context_ids=ids, copied=len(copy))


def make_question(tokenizer: Any, query: Text, *, chat: bool, after: Prompt | None = None) -> Question:
    """Tokenise a question that follows a document, that of ``after`` where it is known.

    Raises UserError when it is empty, and where it would change the document's own tokens.
    """
    before = after.ending if after is not None else None
    if isinstance(query, str):
        _check(query, "question")
    _, _, rest = _frame(tokenizer, "D", query if isinstance(query, str) else "Q", chat)
    if before is not None and before.blank:
        rest = [Piece(before.blank, 0), *rest]
    if isinstance(query, str):
        return asked(follow(tokenizer, before, rest), rest, 0, query)
    at = next(i for i, piece in enumerate(rest) if piece.question)
    separated = chat or (before is not None and bool(before.blank))
    return Question(
        before=follow(tokenizer, before, rest[: at + 1]).part(0, at) if separated else (),
        ids=_ids(query, "question"),
        after=follow(tokenizer, None, rest[at + 1 :]).ids if rest[at + 1 :] else (),
        text=None,
    )


def asked(tokens: Tokens, whole: Sequence[Piece], start: int, text: str) -> Question:
    """Return the question of pieces from ``start`` on, ``text`` as it was given; raises UserError when it is empty."""
    at = next(i for i, piece in enumerate(whole) if piece.question)
    ids = tokens.part(at, at + 1)
    if not ids:
        raise _empty("question")
    return Question(tokens.part(start, at), ids, tokens.part(at + 1, len(whole)), text)


def separator(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of what stands between two texts."""
    return follow(tokenizer, None, [Piece(SEPARATOR, 0), Piece("Q", 0)]).part(0, 1)


def template(tokenizer: Any, chat: bool) -> tuple[str, str, str]:
    """Return the text before the document, between document and question, and after the question.

    Raises UserError without a chat template, or for one that changes the user's message.
    """
    first, _, rest = _frame(tokenizer, "D", "Q", chat)
    at = next(i for i, piece in enumerate(rest) if piece.question)
    head, between, tail = ("".join(piece.text for piece in part) for part in (first, rest[:at], rest[at + 1 :]))
    return head, between, tail


def _frame(tokenizer: Any, document: str, question: str, chat: bool) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """Return the pieces before the document, its own, and those after it."""
    text = f"{document}{SEPARATOR}{question}"
    if not chat:
        return [], [Piece(document, 0)], [Piece(SEPARATOR, 0), Piece(question, 0, True)]
    start = len(text) - len(question.lstrip())
    found = pieces(
        tokenizer, [{"role": "user", "content": text}], [text], [0], {0: (start, start + len(question.strip()))}
    )
    at = next(i for i, piece in enumerate(found) if piece.owner == 0)
    return found[:at], found[at : at + 1], found[at + 1 :]


def _gap(rest: Sequence[Piece]) -> str:
    """Return what stands before the question."""
    return "".join(piece.text for piece in itertools.takewhile(lambda piece: not piece.question, rest))


def _check(text: str, what: str) -> None:
    check_text(text, f"the {what}")
    if not text.strip():
        raise _empty(what)


def _empty(what: str) -> UserError:
    return UserError(
        f"the {what} is empty", given="no text", allowed="some text", remedy=f"Give a {what} with words in it."
    )


def _ids(given: Sequence[int], what: str) -> tuple[int, ...]:
    try:
        ids = tuple(map(operator.index, given.tolist() if hasattr(given, "tolist") else given))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the {what} is neither text nor token ids",
            given=type(given).__name__,
            allowed="a string, or whole numbers",
            remedy=f"Give the {what} as one string.",
        ) from error
    if not ids:
        raise _empty(what)
    return ids


def encode(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    """Return the tokens of a text by itself; without ``special`` what looks like a special token is text."""
    return tuple(call(tokenizer, text, split_special_tokens=not special)["input_ids"]) if text else ()


def _bos(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer itself puts before a text."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tuple(with_special[: with_special.index(without[0])]) if without and without[0] in with_special else ()
