"""Keep control words that somebody said text: a copy of the tokenizer knows them under spellings that no text has.

The template's own control words are spelled so before the copy sees the text; those in said texts are left as they are,
and mean nothing to it. All other tokens are as before, which is checked with said control words taken out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from apb.prompt.encoding import Tokens, Words, call, encode, ends, joined, spelling, written
from apb.prompt.template import Piece
from burst.errors import UserError


def kept_apart(tokenizer: Any, pieces: Sequence[Piece], words: Words) -> Tokens:
    """Return the tokens of the pieces' whole text, control words in said texts taken for text; raises UserError for
    tokenizers that find them in any text, or whose copy gives other tokens."""
    found = _with_copy(tokenizer, pieces, words)
    harmless = [piece if piece.owner is None else Piece(_without(piece.text, words), piece.owner) for piece in pieces]
    if found is None or _with_copy(tokenizer, harmless, words) != encode(tokenizer, harmless, words)[0]:
        said = joined([piece for piece in pieces if piece.owner is not None])
        raise UserError(
            "this tokenizer cannot keep what was said apart from its control words",
            given=", ".join(sorted(word for word in words.values() if word in said))[:80],
            allowed="texts without them",
            remedy="Take the control words out of the document and the question.",
        )
    return found


def _with_copy(tokenizer: Any, pieces: Sequence[Piece], words: Words) -> Tokens | None:
    """Return the copy's tokens; None where control words are not just the template's."""
    copy, numbers = _copy(tokenizer, tuple(words.items()), len(tokenizer))
    spelled, kept = [], []
    for piece in pieces:
        text = piece.text
        if piece.owner is None and text:
            out = call(tokenizer, text)
            own = written(tokenizer, out["input_ids"], out.encodings[0], text, words)
            kept += [number for number, _ in own]
            for number, (start, end) in reversed(own):
                text = f"{text[:start]}{spelling(number)}{text[end:]}"
        spelled.append(Piece(text, piece.owner))
    whole = joined(spelled)
    encoding = copy.encode(whole, add_special_tokens=False)
    ids = tuple(numbers.get(i, i) for i in encoding.ids)
    found = [number for number, _ in written(tokenizer, ids, encoding, whole, words, spelled=True)]
    return Tokens(ids, ends(encoding, len(ids), spelled)) if found == kept else None


def _without(text: str, words: Words) -> str:
    """Return a text with other words where control words were."""
    for word in sorted(words.values(), key=len, reverse=True):
        text = text.replace(word, "x")
    return text


@functools.lru_cache(maxsize=2)
def _copy(tokenizer: Any, words: tuple[tuple[int, str], ...], size: int) -> tuple[Any, dict[int, int]]:
    """Return the copy, and its ids of added tokens with the tokenizer's own.

    ``size`` is the tokenizer's, so that one with more tokens has another copy.
    """
    from tokenizers import Tokenizer

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    of = {text: number for number, text in words}
    for token in description["added_tokens"]:
        if token["content"] in of:
            token["content"] = spelling(of[token["content"]])
    description |= {"post_processor": None, "truncation": None, "padding": None}
    copy = Tokenizer.from_str(json.dumps(description))
    numbers = {}
    for token in description["added_tokens"]:
        found = copy.token_to_id(token["content"])
        assert found is not None
        numbers[found] = int(token["id"])
    return copy, numbers
