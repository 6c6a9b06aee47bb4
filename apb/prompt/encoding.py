"""Tokens of a text in pieces: where each piece's end, and where control words stand."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from apb.prompt.template import SPELL, SPELLED, Piece
from burst.errors import UserError

Span = tuple[int, int]  # characters of the text
Words = Mapping[int, str]  # control words: id and text
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's tokens of single bytes


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text in pieces; ``ends``: how many of them end within the pieces up to each."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]

    def part(self, first: int, last: int) -> tuple[int, ...]:
        """Return the tokens of pieces ``first`` to ``last``, the latter left out."""
        ends = (0, *self.ends)
        return self.ids[ends[first] : ends[last]]


def joined(pieces: Sequence[Piece]) -> str:
    """Return the pieces' whole text."""
    return "".join(piece.text for piece in pieces)


def call(tokenizer: Any, text: str, **options: Any) -> Any:
    """Return what the tokenizer makes of a text; raises UserError for what a damaged or foreign one raises."""
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"the tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'this model'} cannot take a text: {error}",
            given=repr(text[:80]),
            allowed="tokenizers that take any text",
            remedy="Copy the tokenizer's files again, or choose another model.",
        ) from error


def encode(tokenizer: Any, pieces: Sequence[Piece], words: Words) -> tuple[Tokens, list[tuple[int, Span]]]:
    """Return the whole text's tokens, and the control words in it."""
    text = joined(pieces)
    if not text:
        return Tokens((), (0,) * len(pieces)), []
    out = call(tokenizer, text)
    ids, encoding = tuple(out["input_ids"]), out.encodings[0]
    return Tokens(ids, ends(encoding, len(ids), pieces)), written(tokenizer, ids, encoding, text, words)


def ends(encoding: Any, count: int, pieces: Sequence[Piece]) -> tuple[int, ...]:
    """Return how many of ``count`` tokens end with each piece or before."""
    borders = accumulate(len(piece.text) for piece in pieces)
    # Tokens end in the order of the text; those of a character's bytes end together, with the character.
    found = [bisect_right(range(count), border, key=lambda i: _span(encoding, i)[1]) for border in borders]
    return (*found[:-1], count) if found else ()


def written(
    tokenizer: Any, ids: Sequence[int], encoding: Any, text: str, words: Words, *, spelled: bool = False
) -> list[tuple[int, Span]]:
    """Return the control words that a text has, as id and span; what the model makes of unknown signs is none.

    ``spelled``: they stand there as ``spelling`` writes them.
    """
    found = []
    for i in np.flatnonzero(np.isin(np.array(ids, dtype=np.int64), list(words))) if words else ():
        start, end = _span(encoding, int(i))
        number = ids[int(i)]
        word = spelling(number) if spelled else words[number]
        made = number == tokenizer.unk_token_id or _BYTE.fullmatch(words[number])
        if not made or text[start:end].strip() == word:
            found.append((number, (start, end)))
    return found


def spelling(number: int) -> str:
    """Return how a control word is written that no text can have."""
    return f"{SPELL}{number}{SPELLED}"


def _span(encoding: Any, index: int) -> Span:
    found = encoding.token_to_chars(index)
    return (0, 0) if found is None else (int(found[0]), int(found[1]))
