"""A prompt's tokens: those of its whole text, cut where its parts end, with said texts kept free of control words.

Tokenizers merge over the borders of parts ('.' and two line feeds are one token of many), put spaces before texts, and
treat a text's beginning apart. So a prompt is tokenised as one text, which gives the tokens that the chat template's
rendering has in transformers, and a token belongs to the part in which it ends.

Control words (special tokens, and added ones that the template writes) in what somebody said stay text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from apb.prompt.encoding import Tokens, Words, call, encode, joined
from apb.prompt.spelling import kept_apart
from apb.prompt.template import Piece, has_template
from burst.errors import UserError

# How control words are written, and hardly any text: <|im_end|>, <tool_call>, [INST]. HTML's tags are not among them.
_SHAPE = re.compile(r"<[|｜].*[|｜]>|</?[a-z]+(_[a-z]+)+>|\[/?[A-Z_]+\]", re.DOTALL)


def tokenise(tokenizer: Any, pieces: Sequence[Piece], chat_template: Any = None) -> Tokens:
    """Return the tokens of the pieces' whole text; raises UserError where said texts cannot be kept from becoming
    control words, and for tokenizers whose parts' tokens are not the whole's.

    ``chat_template``: the one that wrote the pieces, where it is not the tokenizer's.
    """
    words = control_words(tokenizer, chat_template)
    if not getattr(tokenizer, "is_fast", False):
        return _piecewise(tokenizer, pieces, words)
    tokens, found = encode(tokenizer, pieces, words)
    borders = pairwise([0, *accumulate(len(piece.text) for piece in pieces)])
    said = [border for piece, border in zip(pieces, borders, strict=True) if piece.owner is not None]
    if any(start < last and end > first for _, (start, end) in found for first, last in said):
        return kept_apart(tokenizer, pieces, words)
    return tokens


def control_words(tokenizer: Any, chat_template: Any = None) -> dict[int, str]:
    """Return the ids and texts of control words: special tokens, and added ones of that shape or in the template."""
    templates = chat_template or (tokenizer.chat_template if has_template(tokenizer) else "")
    sources = "\0".join(map(str, templates.values())) if isinstance(templates, dict) else str(templates)
    found = {}
    for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        text = str(token)
        listed = text in sources and not text.isspace()  # runs of white space are text, whoever writes them
        if getattr(token, "special", False) or listed or _SHAPE.fullmatch(text):
            found[int(number)] = text
    return found


def _piecewise(tokenizer: Any, pieces: Sequence[Piece], words: Words) -> Tokens:
    """Tokenise with a tokenizer that does not say where its tokens stand: part by part, which must give the whole."""
    parts = [tuple(call(tokenizer, piece.text)["input_ids"]) if piece.text else () for piece in pieces]
    ids, text = tuple(i for part in parts for i in part), joined(pieces)
    theirs = [i for piece, part in zip(pieces, parts, strict=True) if piece.owner is not None for i in part]
    said = {words[i] for i in theirs if i in words}
    if said or (text and ids != tuple(call(tokenizer, text)["input_ids"])):
        raise UserError(
            "this tokenizer gives a prompt's parts other tokens than the whole prompt, or makes text a control word",
            given=", ".join(sorted(said)) or repr(text[:80]),
            allowed="tokenizers with a tokenizer.json, or texts that it takes apart the same way",
            remedy="Convert the tokenizer to tokenizer.json, or give the prompt as token ids.",
        )
    return Tokens(ids, tuple(accumulate(map(len, parts))))
