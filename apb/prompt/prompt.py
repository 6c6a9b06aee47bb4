"""A prompt in its parts: template head, document, question, template tail, each tokenised on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from apb.plan.shapes import PromptLengths
from burst.errors import UserError

Text = str | Sequence[int]  # text, or token ids as they are

# Marks that stand for document and question while the chat template is filled in; private-use characters occur in no
# template, and no template's trimming touches them.
_DOCUMENT, _QUESTION = "\ue000document\ue001", "\ue000question\ue001"
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
    tokenizer's BOS (if it adds one; ids are taken as they are) and nothing follows the question.
    """
    head_text, _, _ = template(tokenizer, chat)
    head = encode(tokenizer, head_text, special=True)
    if not chat and isinstance(context, str):
        head = _bos(tokenizer)
    document = _content(tokenizer, context, "document")
    question = None if query is None else make_question(tokenizer, query, chat=chat)
    return Prompt((*head, *document), len(head), question, chat)


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
    copy = (*question.ids, *(encode(tokenizer, SEPARATOR, special=False) if text else ()))
    ids = prompt.context_ids[: prompt.head] + copy + prompt.context_ids[prompt.head :]
    return replace(prompt, context_ids=ids, copied=len(copy))


def make_question(tokenizer: Any, query: Text, *, chat: bool) -> Question:
    """Tokenise a question that follows a document; raises UserError when it is empty."""
    _, between, tail = template(tokenizer, chat)
    separated = chat or isinstance(query, str)
    return Question(
        before=encode(tokenizer, between, special=True) if separated else (),
        ids=_content(tokenizer, query, "question"),
        after=encode(tokenizer, tail, special=True),
        text=query if isinstance(query, str) else None,
    )


def template(tokenizer: Any, chat: bool) -> tuple[str, str, str]:
    """Return the text before the document, between document and question, and after the question.

    Raises UserError without a chat template, or for one that changes the user's message.
    """
    if not chat:
        return "", SEPARATOR, ""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "this model has no chat template",
            given="chat=true",
            allowed="chat=false, or a tokenizer with a chat template",
            remedy="Set chat=false to continue plain text.",
        )
    filled: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{_DOCUMENT}{SEPARATOR}{_QUESTION}"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    head, found_document, rest = filled.partition(_DOCUMENT)
    between, found_question, tail = rest.partition(_QUESTION)
    if not found_document or not found_question:
        raise UserError(
            "the chat template changes the user's message, so document and question cannot be told apart",
            given=f"{filled[:80]!r}...",
            allowed="templates that contain the user's message as it is",
            remedy="Set chat=false, or use another chat template.",
        )
    return head, between, tail


def _content(tokenizer: Any, text: Text, what: str) -> tuple[int, ...]:
    if isinstance(text, str):
        # What looks like a special token in the user's text is text.
        ids = encode(tokenizer, text, special=False) if text.strip() else ()
    else:
        try:
            ids = tuple(int(i) for i in text)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the {what} is neither text nor token ids",
                given=type(text).__name__,
                allowed="a string, or whole numbers",
                remedy=f"Give the {what} as one string.",
            ) from error
    if not ids:
        raise UserError(
            f"the {what} is empty", given="no text", allowed="some text", remedy=f"Give a {what} with words in it."
        )
    return ids


def encode(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    """Return the text's tokens; without ``special`` what looks like a special token is text."""
    if not text:
        return ()
    out = tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)
    return tuple(out["input_ids"])


def _bos(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer itself puts before a text."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tuple(with_special[: with_special.index(without[0])]) if without else ()
