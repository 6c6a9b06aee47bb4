"""Conversations made into prompts: the places of document and question in any chat template.

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
from typing import Any

from apb.prompt.later import ending
from apb.prompt.prompt import Prompt, Question, asked
from apb.prompt.template import Message, Piece, check_text, pieces
from apb.prompt.tokens import tokenise
from burst.errors import UserError


def make_conversation(
    tokenizer: Any, messages: Sequence[Message], *, question: str | None = None, **template: Any
) -> Prompt:
    """Render messages with the tokenizer's chat template and split them; ``template`` holds its own variables (tools,
    chat_template, enable_thinking ...).

    ``question``: how the last user message ends, when its last paragraph is not what is asked. The tokens are those of
    the whole rendered text. Raises UserError for a conversation without a user's text, for a
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
    span = (0, len(texts[last]))
    if question is not None or document == last:
        span = _asked(texts[last], question)
        if document == last and span[0] == 0:  # nothing but a question: the document is another message, if any
            document = max((i for i in given if i < last), key=lambda i: len(texts[i]), default=None)
    found = pieces(tokenizer, messages, texts, given, {last: span}, **template)
    tokens = tokenise(tokenizer, found, template.get("chat_template"))
    at = next(i for i, piece in enumerate(found) if piece.question)
    start = next((i for i, piece in enumerate(found) if piece.owner == document is not None), at)
    # Context goes up to the end of what was said before the question, or of a document that comes after it.
    late = document is not None and document > last
    end = start + 1 if late else _end(found, start, at)
    start = min(start, end)
    if not late and end == start:  # there is no document: the template's head alone is context
        start = end = at
    made: Question | None = asked(tokens, found, end, found[at].text) if not late else None
    if late and (ids := tokens.part(end, len(found))):  # what follows the document takes the question's place
        made = Question(before=(), ids=ids, after=(), text=None)
    context = tokens.part(0, end)
    if not context or made is None:
        raise UserError(
            "the chat template leaves nothing before or nothing after the document",
            given=f"{len(context)} tokens of context",
            allowed="templates with a generation prompt",
            remedy="Use another chat template, or Engine.prefill with context and query apart.",
        )
    last_text = ending(tokenizer, found, end, tokens, chat_template=template.get("chat_template"))
    return Prompt(context, len(tokens.part(0, start)), made, chat=True, ending=last_text)


def _end(found: Sequence[Piece], start: int, end: int) -> int:
    """Leave out markup and white space at the end of pieces ``start`` to ``end``."""
    while end > start and (found[end - 1].owner is None or not found[end - 1].text.strip()):
        end -= 1
    return end


def _asked(text: str, question: str | None) -> tuple[int, int]:
    """Return the place of the question in the last user message: as named, or its last paragraph, or all of it."""
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


def _text(message: Message) -> str:
    """A message's text; lists of text parts, as clients of chat APIs send them, are put together."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    texts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in parts]
    joined = "".join(t for t in texts if isinstance(t, str))
    if not all(isinstance(t, str) for t in texts):
        raise UserError(
            "a message's content is not text",
            given=f"{message.get('role')}: {str(content)[:80]}",
            allowed="text, or a list of text parts",
            remedy="Leave images, audio and the like out.",
        )
    check_text(joined, "a message's content")
    return joined
