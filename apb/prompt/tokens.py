"""A prompt's tokens: those of its whole text, cut where its parts end, with said texts kept free of control words.

Tokenizers merge over the borders of parts ('.' and two line feeds are one token of many), put spaces before texts, and
treat a text's beginning apart. So a prompt is tokenised as one text, which gives the tokens that the chat template's
rendering has in transformers, and a token belongs to the part in which it ends.

Control words (special tokens, and added ones that the template writes) in what somebody said stay text. Where there are
some, a copy of the tokenizer does the work that spells its control words in noncharacters, which no text has; the
template's own are spelled so before it sees the text.
"""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from apb.prompt.template import SPELL, SPELLED, Piece, has_template
from burst.errors import UserError

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's tokens of single bytes
# How control words are written, and hardly any text: <|im_end|>, <tool_call>, [INST]. HTML's tags are not among them.
_SHAPE = re.compile(r"<[|｜].*[|｜]>|</?[a-z]+(_[a-z]+)+>|\[/?[A-Z_]+\]", re.DOTALL)


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text in pieces; ``ends``: how many of them end within the pieces up to each."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]

    def part(self, first: int, last: int) -> tuple[int, ...]:
        """Return the tokens of pieces ``first`` to ``last``, the latter left out."""
        ends = (0, *self.ends)
        return self.ids[ends[first] : ends[last]]


def tokenise(tokenizer: Any, pieces: Sequence[Piece], chat_template: Any = None) -> Tokens:
    """Return the tokens of the pieces' whole text; raises UserError where said texts cannot be kept from becoming
    control words, and for tokenizers whose parts' tokens are not the whole's.

    ``chat_template``: the one that wrote the pieces, where it is not the tokenizer's.
    """
    words = control_words(tokenizer, chat_template)
    if not getattr(tokenizer, "is_fast", False):
        return _piecewise(tokenizer, pieces, words)
    ids, ends, spans = _encode(tokenizer, pieces, words)
    borders = [0, *accumulate(len(piece.text) for piece in pieces)]
    said = [(a, b) for piece, a, b in zip(pieces, borders, borders[1:], strict=False) if piece.owner is not None]
    if not any(start < b and end > a for start, end in spans for a, b in said):
        return Tokens(ids, ends)
    return _spelled(tokenizer, pieces, words)


def control_words(tokenizer: Any, chat_template: Any = None) -> dict[int, str]:
    """Return the ids and texts of control words: special tokens, and added ones of that shape or in the template."""
    templates = chat_template or (tokenizer.chat_template if has_template(tokenizer) else "")
    written = "\0".join(map(str, templates.values())) if isinstance(templates, dict) else str(templates)
    found = {}
    for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        text = str(token)
        listed = text in written and not text.isspace()  # runs of white space are text, whoever writes them
        if getattr(token, "special", False) or listed or _SHAPE.fullmatch(text):
            found[int(number)] = text
    return found


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


def _encode(
    tokenizer: Any, pieces: Sequence[Piece], words: dict[int, str]
) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]]]:
    """Return the whole text's tokens, how many end with each piece, and where control words stand in the text."""
    text = "".join(piece.text for piece in pieces)
    if not text:
        return (), (0,) * len(pieces), []
    out = call(tokenizer, text)
    ids, encoding = tuple(out["input_ids"]), out.encodings[0]
    return ids, _ends(encoding, len(ids), pieces), [span for _, span in _written(tokenizer, ids, encoding, text, words)]


def _written(
    tokenizer: Any, ids: Sequence[int], encoding: Any, text: str, words: dict[int, str], spelled: bool = False
) -> list[tuple[int, tuple[int, int]]]:
    """Return the control words that a text has, as id and span; what the model makes of unknown signs is none."""
    found = []
    for i in np.flatnonzero(np.isin(np.array(ids, dtype=np.int64), list(words))) if words else ():
        start, end = _span(encoding, int(i))
        number = ids[int(i)]
        word = _spelling(number) if spelled else words[number]
        made = number == tokenizer.unk_token_id or _BYTE.fullmatch(words[number])
        if not made or text[start:end].strip() == word:
            found.append((number, (start, end)))
    return found


def _ends(encoding: Any, count: int, pieces: Sequence[Piece]) -> tuple[int, ...]:
    borders = accumulate(len(piece.text) for piece in pieces)
    # Tokens end in the order of the text; those of a character's bytes end together, with the character.
    ends = [bisect_right(range(count), border, key=lambda i: _span(encoding, i)[1]) for border in borders]
    return (*ends[:-1], count) if ends else ()


def _span(encoding: Any, index: int) -> tuple[int, int]:
    found = encoding.token_to_chars(index)
    return (0, 0) if found is None else (int(found[0]), int(found[1]))


def _spelled(tokenizer: Any, pieces: Sequence[Piece], words: dict[int, str]) -> Tokens:
    """Tokenise with control words in said texts, which stay text."""
    copy, numbers = _speller(tokenizer, tuple(words.items()), len(tokenizer))
    spelled, kept = [], []
    for piece in pieces:
        text = piece.text
        if piece.owner is None and text:
            out = call(tokenizer, text)
            own = _written(tokenizer, out["input_ids"], out.encodings[0], text, words)
            kept += [number for number, _ in own]
            for number, (start, end) in reversed(own):
                text = f"{text[:start]}{_spelling(number)}{text[end:]}"
        spelled.append(Piece(text, piece.owner))
    whole = "".join(piece.text for piece in spelled)
    encoding = copy.encode(whole, add_special_tokens=False)
    ids = tuple(numbers.get(i, i) for i in encoding.ids)
    found = [number for number, _ in _written(tokenizer, ids, encoding, whole, words, spelled=True)]
    if found != kept:
        raise UserError(
            "this tokenizer cannot keep what was said apart from its control words",
            given=", ".join(sorted({words[i] for i in found + kept}))[:80],
            allowed="texts without them",
            remedy="Take the control words out of the document and the question.",
        )
    return Tokens(ids, _ends(encoding, len(ids), spelled))


def _spelling(number: int) -> str:
    return f"{SPELL}{number}{SPELLED}"


@functools.lru_cache(maxsize=2)
def _speller(tokenizer: Any, words: tuple[tuple[int, str], ...], size: int) -> tuple[Any, dict[int, int]]:
    """Return the copy whose control words are spelled in noncharacters, and its ids of added tokens where they differ.

    ``size`` is the tokenizer's, so that one with more tokens has another copy.
    """
    from tokenizers import Tokenizer

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    of = {text: number for number, text in words}
    for token in description["added_tokens"]:
        if token["content"] in of:
            token["content"] = _spelling(of[token["content"]])
    description |= {"post_processor": None, "truncation": None, "padding": None}
    copy = Tokenizer.from_str(json.dumps(description))
    numbers = {}
    for token in description["added_tokens"]:
        found = copy.token_to_id(token["content"])
        assert found is not None
        numbers[found] = int(token["id"])
    return copy, numbers


def _piecewise(tokenizer: Any, pieces: Sequence[Piece], words: dict[int, str]) -> Tokens:
    """Tokenise with a tokenizer that does not say where its tokens stand: part by part, which must give the whole."""
    parts = [tuple(call(tokenizer, piece.text)["input_ids"]) if piece.text else () for piece in pieces]
    ids = tuple(i for part in parts for i in part)
    said = {
        words[i]
        for piece, part in zip(pieces, parts, strict=True)
        if piece.owner is not None
        for i in part
        if i in words
    }
    text = "".join(piece.text for piece in pieces)
    if said or (text and ids != tuple(call(tokenizer, text)["input_ids"])):
        raise UserError(
            "this tokenizer gives a prompt's parts other tokens than the whole prompt, or makes text a control word",
            given=", ".join(sorted(said)) or repr(text[:80]),
            allowed="tokenizers with a tokenizer.json, or texts that it takes apart the same way",
            remedy="Convert the tokenizer to tokenizer.json, or give the prompt as token ids.",
        )
    return Tokens(ids, tuple(accumulate(map(len, parts))))
