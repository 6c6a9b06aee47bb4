"""Texts of the command line: one, or a list in brackets; quoted or bare, with backslashes for line feeds and such."""

from __future__ import annotations

import re

from burst.errors import UserError

_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.|$)", re.DOTALL)
_SIGNS = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"', "[": "[", "]": "]", ",": ","}
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_ITEM = re.compile(rf"\s*({_QUOTED}|(?:[^,'\"\\]|\\.)(?:[^,\\]|\\.)*|)\s*(,|$)", re.DOTALL)
_NO_TEXT = re.compile(r"[+-]?[0-9][0-9_.eE+-]*|true|false|null|", re.IGNORECASE)


def texts(key: str, value: str) -> list[str]:
    """Return the texts that ``key=value`` names: none for nothing or ``null``.

    Raises UserError for lists that cannot be read, for numbers in them, and for unknown backslash sequences.
    """
    if value in ("", "null"):
        return []
    listed = value.strip()
    if not (listed.startswith("[") and listed.endswith("]")):
        return [_text(key, value, value)]
    found: list[str] = []
    at, inside = 0, listed[1:-1]
    while inside.strip():
        item = _ITEM.match(inside, at)
        word = item[1].strip() if item is not None else ""
        if item is None or _NO_TEXT.fullmatch(word):
            raise UserError(
                f"{key} is not a list of texts",
                given=value,
                allowed=f"a list of texts, as {key}=['User:','\\n'], or one text",
                remedy="Put every text into quotes, with commas between them.",
            )
        found.append(_text(key, word, value))
        at = item.end()
        if not item[2]:
            break
    return found


def _text(key: str, word: str, value: str) -> str:
    """Return one text without its quotes, its backslash sequences written out."""
    inner = word[1:-1] if re.fullmatch(_QUOTED, word, re.DOTALL) else word

    def sign(found: re.Match[str]) -> str:
        name = found[1]
        if len(name) > 1:
            return chr(int(name[1:], 16))
        if name not in _SIGNS:
            raise UserError(
                f"{key} holds a backslash that means nothing",
                given=value,
                allowed=r"\n, \r, \t, \\, \', \", \xNN and \uNNNN",
                remedy="Write a backslash itself twice.",
            )
        return _SIGNS[name]

    return _ESCAPE.sub(sign, inner)
