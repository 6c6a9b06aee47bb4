"""From a conversation to a prompt in its parts: where document and question stand in any chat template.

The rules, in words (`docs/prompts.md` shows them for five templates):

- the **document** is the longest text that a user, a system prompt or a tool gave; the template's head ends where it
  begins, so whatever stands before it is kept in front of every anchor;
- the **question** is the last user message; where that message is the document's own, its last paragraph, or the text
  that the caller names;
- everything before the question is context and is spread over the hosts; everything after it (tool calls and results,
  the generation prompt) runs with the question;
- where the document comes after the last user message (a tool's result), the question stands in the head already, and
  what follows the document is asked in its place;
- texts of users, tools and system prompts never become special tokens; the template and the model's own turns may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apb.prompt.prompt import Prompt, Question, encode
from burst.errors import UserError

Message = Mapping[str, Any]  # "role" and "content", and whatever else the template reads

# Noncharacters: Unicode keeps them for use inside programs, so no text has them, and no template trims them.
_OPEN, _CLOSE, _ASK, _ASKED = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"{_OPEN}[0-9]+;|[{_CLOSE}{_ASK}{_ASKED}]")
_ANY_MARK = re.compile(f"[{_OPEN}{_CLOSE}{_ASK}{_ASKED}]")


@dataclass
class _Piece:
    """A stretch of the rendered conversation: of message ``owner``, or of the template where that is None."""

    text: str
    owner: int | None
    question: bool


def make_conversation(
    tokenizer: Any, messages: Sequence[Message], *, question: str | None = None, **template: Any
) -> Prompt:
    """Render messages with the tokenizer's chat template and split them; ``template`` holds its own variables (tools,
    chat_template, enable_thinking ...).

    ``question``: how the last user message ends, when its last paragraph is not what is asked. The tokens are those of
    the rendered text, its parts tokenised separately. Raises UserError for a conversation without a user's text, for a
    question that the last user message does not end with, and for templates that rewrite what was said.
    """
    texts = [_text(message) for message in messages]
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user" and texts[i].strip()), default=None)
    if last is None:
        raise UserError(
            "this conversation has no question",
            given=[str(m.get("role")) for m in messages],
            allowed="at least one user message with text",
            remedy="Add a user message.",
        )
    given = [i for i, m in enumerate(messages) if m.get("role") != "assistant" and texts[i].strip()]
    document: int | None = max(given, key=lambda i: len(texts[i]))
    asked = (0, len(texts[last]))
    if question is not None or document == last:
        asked = _asked(texts[last], question)
        if document == last and asked[0] == 0:  # nothing but a question: the document is another message, if any
            document = max((i for i in given if i < last), key=lambda i: len(texts[i]), default=None)
    pieces = _render(tokenizer, messages, texts, given, last, asked, template)
    if document is not None and document > last:
        return _after_document(tokenizer, pieces, document)
    return _split(tokenizer, pieces, document)


def _split(tokenizer: Any, pieces: Sequence[_Piece], document: int | None) -> Prompt:
    """Context up to the end of what was said before the question; the rest runs with it."""
    at = next(i for i, piece in enumerate(pieces) if piece.question)
    start = next((i for i, piece in enumerate(pieces) if piece.owner == document is not None), at)
    end = at
    while end > start and (pieces[end - 1].owner is None or not pieces[end - 1].text.strip()):
        end -= 1  # markup and white space just before the question
    if end == start:  # there is no document: the template's head alone is context
        start = end = at
    return _prompt(
        _ids(tokenizer, pieces[:start]),
        _ids(tokenizer, pieces[start:end]),
        Question(
            before=_ids(tokenizer, pieces[end:at]),
            ids=_ids(tokenizer, pieces[at : at + 1]),
            after=_ids(tokenizer, pieces[at + 1 :]),
            text=pieces[at].text,
        ),
    )


def _after_document(tokenizer: Any, pieces: Sequence[_Piece], document: int) -> Prompt:
    """The document is the latest text: what follows it takes the question's place."""
    at = next(i for i, piece in enumerate(pieces) if piece.owner == document)
    asked = _ids(tokenizer, pieces[at + 1 :])
    return _prompt(
        _ids(tokenizer, pieces[:at]),
        _ids(tokenizer, pieces[at : at + 1]),
        Question(before=(), ids=asked, after=(), text=None) if asked else None,
    )


def _prompt(head: tuple[int, ...], rest: tuple[int, ...], question: Question | None) -> Prompt:
    if not head + rest or question is None:
        raise UserError(
            "the chat template leaves nothing before or nothing after the document",
            given=f"{len(head + rest)} tokens of context",
            allowed="templates with a generation prompt",
            remedy="Use another chat template, or Engine.prefill with context and query apart.",
        )
    return Prompt(head + rest, len(head), question, chat=True)


def _asked(text: str, question: str | None) -> tuple[int, int]:
    """Where in the last user message the question stands: as named, or its last paragraph, or all of it."""
    end = len(text.rstrip())
    if question is not None:
        wanted = question.strip()
        if not wanted or not text[:end].endswith(wanted):
            raise UserError(
                "the last user message does not end with this question",
                given=repr(question[:80]),
                allowed=f"the end of {text[:end][-80:]!r}",
                remedy="Give the question as it stands there, or leave it out.",
            )
        return end - len(wanted), end
    paragraphs = list(re.finditer(r"\n\s*\n", text[:end]))
    start = paragraphs[-1].end() if paragraphs else 0
    return (start, end) if text[:start].strip() else (0, len(text))


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    texts: Sequence[str],
    given: Sequence[int],
    last: int,
    asked: tuple[int, int],
    template: Mapping[str, Any],
) -> list[_Piece]:
    """Fill in the template with marks round every given text, and cut at the marks.

    Templates that trim texts are filled in with trimmed ones; the marked rendering must be the plain one but for marks.
    """
    if not getattr(tokenizer, "chat_template", None) and "chat_template" not in template:
        raise UserError(
            "this model has no chat template",
            given="a conversation",
            allowed="a tokenizer with a chat template, or chat_template=...",
            remedy="Use Engine.prefill with chat=False.",
        )

    def render(contents: Mapping[int, str]) -> str:
        filled = [{**m, "content": contents[i]} if i in contents else dict(m) for i, m in enumerate(messages)]
        out: str = tokenizer.apply_chat_template(filled, tokenize=False, add_generation_prompt=True, **template)
        return out

    plain = render({i: texts[i] for i in given})
    for trimmed in (False, True):
        marked = render({i: _mark(i, texts[i], asked if i == last else None, trimmed) for i in given})
        if _MARKS.sub("", marked) == plain:
            pieces = _cut(marked)
            if sum(piece.question for piece in pieces) == 1:
                return pieces
    raise UserError(
        "the chat template changes or drops what was said, so document and question cannot be told apart",
        given=f"{plain[:80]!r}...",
        allowed="templates that contain the messages as they are, trimmed at most",
        remedy="Use another chat template, or Engine.prefill with context and query apart.",
    )


def _mark(number: int, text: str, asked: tuple[int, int] | None, trimmed: bool) -> str:
    if asked is not None:
        start, end = asked
        text = f"{text[:start]}{_ASK}{text[start:end].strip() if trimmed else text[start:end]}{_ASKED}{text[end:]}"
    return f"{_OPEN}{number};{text.strip() if trimmed else text}{_CLOSE}"


def _cut(marked: str) -> list[_Piece]:
    """Cut a rendering at its marks, and white space off before the question; empty pieces are left out."""
    pieces: list[_Piece] = []
    owner: int | None = None
    question = False
    start = 0
    for mark in [*_MARKS.finditer(marked), None]:
        text = marked[start : mark.start() if mark else None]
        kept = len(text.rstrip()) if mark and mark[0] == _ASK else len(text)
        pieces += [_Piece(part, owner, question) for part in (text[:kept], text[kept:]) if part]
        if mark is None:
            return pieces
        sign = mark[0][0]
        owner = int(mark[0][1:-1]) if sign == _OPEN else None if sign == _CLOSE else owner
        question = sign == _ASK or (question and sign != _ASKED)
        start = mark.end()
    raise AssertionError(marked)


def _text(message: Message) -> str:
    """A message's text; lists of text parts, as clients of chat APIs send them, are put together."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    texts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in parts]
    joined = "".join(t for t in texts if isinstance(t, str))
    if not all(isinstance(t, str) for t in texts) or _ANY_MARK.search(joined):
        raise UserError(
            "a message's content is not text",
            given=f"{message.get('role')}: {str(content)[:80]}",
            allowed="text without Unicode noncharacters, or a list of text parts",
            remedy="Leave images, audio and the like out.",
        )
    return joined


def _ids(tokenizer: Any, pieces: Sequence[_Piece]) -> tuple[int, ...]:
    """Tokenise pieces; what looks like a special token in a given text is text."""
    return tuple(i for piece in pieces for i in encode(tokenizer, piece.text, special=piece.owner is None))
