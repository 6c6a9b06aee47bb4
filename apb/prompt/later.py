"""Questions that follow a context tokenised already: the tokens that its last text and a later question have together.

A question's first tokens depend on the text before it, never on all of a long document: the context's last text is
kept, tokenised again together with what follows, and must begin with the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apb.prompt.encoding import Tokens
from apb.prompt.template import Piece
from apb.prompt.tokens import tokenise
from burst.errors import UserError

_CHARACTERS = 2000  # of the last text, at first
_UNLIKE = 32  # tokens at its beginning that may differ from the context's own, which stand in a longer text
_NEUTRAL = ("a", ".", "1", "\n")  # what ends as a token of its own before most texts


@dataclass(frozen=True)
class Ending:
    """A context's last text in ``pieces``, and the tokens that it begins with whatever question follows.

    ``blank``: white space at the document's end, which no token of the context holds.
    """

    pieces: tuple[Piece, ...]
    ids: tuple[int, ...]
    blank: str = ""


def ending(
    tokenizer: Any, pieces: Sequence[Piece], end: int, tokens: Tokens, blank: str = "", chat_template: Any = None
) -> Ending:
    """Return the ending of the context that pieces up to ``end`` make; ``tokens`` are those of all pieces."""
    context, rest = tokens.part(0, end), tokens.part(end, len(pieces))
    size = _CHARACTERS
    while True:
        last = _last(pieces[:end], size)
        found = tokenise(tokenizer, [*last, *pieces[end:]], chat_template).ids
        own = found[: len(found) - len(rest)]
        alike = own[min(_UNLIKE, len(own)) :]
        same = found[len(own) :] == rest and context[len(context) - len(alike) :] == alike
        if len(last) == end and last[0] == pieces[0]:
            assert found == tokens.ids
            return Ending(tuple(last), own, blank)
        if same and alike:
            return Ending(tuple(last), own, blank)
        size *= 8


def follow(tokenizer: Any, before: Ending | None, rest: Sequence[Piece]) -> Tokens:
    """Return the tokens of pieces that follow a context, or (None) some text that is not known.

    Raises UserError where they change the context's own tokens.
    """
    if before is not None:
        found = tokenise(tokenizer, [*before.pieces, *rest])
        count, skipped = len(before.ids), len(before.pieces)
        if found.ids[:count] != before.ids:
            raise UserError(
                "this question's beginning would change the document's last tokens",
                given=repr("".join(piece.text for piece in rest)[:80]),
                allowed="questions that leave the tokens before them as they are",
                remedy="Begin the question with a word, or prefill the document with it.",
            )
        return Tokens(found.ids[count:], tuple(max(0, end - count) for end in found.ends[skipped:]))
    for text in _NEUTRAL:
        alone = tokenise(tokenizer, [Piece(text, 0)]).ids
        found = tokenise(tokenizer, [Piece(text, 0), *rest])
        if alone and found.ends[0] == len(alone) and found.ids[: len(alone)] == alone:
            return Tokens(found.ids[len(alone) :], tuple(end - len(alone) for end in found.ends[1:]))
    return tokenise(tokenizer, rest)


def _last(pieces: Sequence[Piece], size: int) -> list[Piece]:
    """Return the last ``size`` characters of pieces; what is cut is a piece that was said."""
    found: list[Piece] = []
    for piece in reversed(pieces):
        text = piece.text if piece.owner is None else piece.text[-size:]
        found.insert(0, Piece(text, piece.owner))
        size -= len(text)
        if size <= 0:
            break
    return found
