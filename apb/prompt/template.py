"""Chat templates: what they make of messages, with all that goes wrong in them said as the model files' mistake.

Templates are filled in with marks round every text that was said, so that it is known where it stands. Marks stand
inside the white space at a text's ends, so that templates may trim. The rendering must be the plain one but for marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apb.prompt.renderer import fill
from burst.errors import UserError

Message = Mapping[str, Any]  # "role" and "content", and whatever else the template reads

# Noncharacters: Unicode keeps them for use inside programs, so no text has them, and no template trims them.
OPEN, CLOSE, TOLD, ASK, ASKED = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
SPELL, SPELLED = "\ufdd5", "\ufdd6"  # round a control word's number, see ``apb.prompt.spelling``
_NO_TEXT = re.compile("[\ufdd0-\ufdd6\ud800-\udfff]")
_MARKS = re.compile(f"{OPEN}[0-9]+;|[{CLOSE}{TOLD}{ASK}{ASKED}]")
# Jinja's words, which no variable can be called.
_KEYWORDS = {"and", "or", "not", "in", "is", "if", "else", "true", "false", "none", "True", "False", "None"}


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt's text: said in message ``owner``, or the template's own where that is None."""

    text: str
    owner: int | None = None
    question: bool = False


def has_template(tokenizer: Any) -> bool:
    """Return True where the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, conversations: Sequence[Sequence[Message]], **options: Any) -> list[str]:
    """Return the chat template's text for every conversation, as transformers' own apply_chat_template gives it.

    ``options``: the template's variables (tools, enable_thinking ...), ``chat_template`` and ``add_generation_prompt``
    (true). Raises UserError for a template that cannot be filled in.
    """
    options = {"add_generation_prompt": True} | options
    given = options.pop("chat_template", None)
    if given is None and not has_template(tokenizer):
        raise UserError(
            "this model has no chat template",
            given="a conversation",
            allowed="a tokenizer with a chat template, or chat_template=...",
            remedy="Set chat=false to continue plain text.",
        )
    name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
    try:
        source = tokenizer.get_chat_template(given, options.get("tools"))
        return fill(source, [_variables(tokenizer, messages, options) for messages in conversations])
    # A named template that is not there, messages that are no mappings, tools that are no schemas: many kinds, as
    # transformers' versions have it. All of them mean what was given or the template.
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the chat template of {name} cannot be filled in: {said}",
            given=f"messages of {', '.join(str(m.get('role')) for m in conversations[0] if isinstance(m, Mapping))}",
            allowed="messages and roles that the template takes; a template that ends at once and writes little more "
            "than it was given",
            remedy="Change the roles, use another chat template, or set chat=false to continue plain text.",
        ) from error


def pieces(
    tokenizer: Any,
    messages: Sequence[Message],
    texts: Sequence[str],
    given: Sequence[int],
    asked: Mapping[int, tuple[int, int]],
    **options: Any,
) -> list[Piece]:
    """Return the conversation's rendering, cut where texts of the ``given`` messages begin and end.

    ``asked``: of which message which characters are the question; it gets pieces of its own, and so does white space
    between what is told before it and the question. Raises UserError for templates that cannot be filled in, and for
    those that rewrite or drop what was said.
    """

    def filled(contents: Mapping[int, str]) -> list[Message]:
        return [{**m, "content": contents[i]} if i in contents else dict(m) for i, m in enumerate(messages)]

    marked_texts = {i: _mark(i, texts[i], asked.get(i)) for i in given}
    conversations = [filled({i: texts[i] for i in given}), filled(marked_texts)]
    plain, marked = render(tokenizer, conversations, **options)
    if _MARKS.sub("", marked) == plain:
        found = _cut(marked)
        if sum(piece.question for piece in found) == len(asked):
            return found
    raise UserError(
        "the chat template changes or drops what was said, so document and question cannot be told apart",
        given=f"{plain[:80]!r}...",
        allowed="templates that contain the messages as they are, trimmed at most",
        remedy="Use another chat template, set chat=false, or use Engine.prefill with context and query apart.",
    )


def check_text(text: str, what: str) -> None:
    """Refuse what no tokenizer takes or what stands for marks here; raises UserError."""
    found = _NO_TEXT.search(text)
    if found is not None:
        raise UserError(
            f"{what} is not text",
            given=ascii(found[0]),
            allowed="text without lone surrogates and without the noncharacters U+FDD0 to U+FDD6",
            remedy="Leave such characters out.",
        )


def _mark(number: int, text: str, asked: tuple[int, int] | None) -> str:
    core = text.strip()
    start = text.index(core)
    end = start + len(core)
    if asked is not None:
        first, last = max(asked[0], start), min(asked[1], end)
        told = text[start:first].rstrip()
        core = f"{told}{TOLD}{text[start + len(told) : first]}{ASK}{text[first:last]}{ASKED}{text[last:end]}"
    return f"{text[:start]}{OPEN}{number};{core}{CLOSE}{text[end:]}"


def _cut(marked: str) -> list[Piece]:
    """Cut a rendering at its marks; empty pieces are left out."""
    found: list[Piece] = []
    owner: int | None = None
    question = False
    start = 0
    for mark in [*_MARKS.finditer(marked), None]:
        text = marked[start : mark.start() if mark else None]
        found += [Piece(text, owner, question)] if text else []
        if mark is None:
            return found
        sign = mark[0][0]
        owner = int(mark[0][1:-1]) if sign == OPEN else None if sign == CLOSE else owner
        question = sign == ASK or (question and sign != ASKED)
        start = mark.end()
    raise AssertionError(marked)


def _variables(tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers shows a chat template: a template of our own, which it fills in, says so."""
    names = {"messages", "tools", "documents", "add_generation_prompt", *tokenizer.special_tokens_map, *options}
    told = ", ".join(f"'{name}': {name}" for name in sorted(names) if name.isidentifier() and name not in _KEYWORDS)
    probe = f"{{{{ {{{told}}} | tojson }}}}"
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, chat_template=probe, **options)
    found: dict[str, Any] = json.loads(text)
    return found
