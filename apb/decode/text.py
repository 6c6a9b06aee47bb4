"""Token ids to text as they come, with stop strings.

A stop string may be the text of a special token, which answers do not show; so stop strings are looked for in the text
with special tokens, and what is shown is that text without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # how a tokenizer shows bytes that are not a whole character yet


class TextStream:
    """Turns tokens into text piece by piece; text that may still become a stop string is held back.

    ``stopped`` is set once a stop string has appeared; the text ends before it. Without a tokenizer, as random weights
    have none, there is no text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = _special_texts(tokenizer) if stop and tokenizer is not None else {}
        self._ids: list[int] = []
        self._prefix = 0  # tokens before this one are decoded for good
        self._read = 0
        self._taken = 0  # characters of the tokens from ``_prefix`` on that are in the text already
        self._shown = 0
        self._whole = ""  # decoded so far, special tokens included where there are stop strings, cut at a stop string
        self._hidden: list[tuple[int, int]] = []  # where in it special tokens stand: start, length
        self.stopped = False

    @property
    def text(self) -> str:
        """The text so far: what is shown and what is held back."""
        parts, at = [], 0
        for start, length in self._hidden:
            parts.append(self._whole[at:start])
            at = start + length
        return "".join([*parts, self._whole[at:]])

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown now."""
        if token in self._special:
            self._hidden.append((len(self._whole), len(self._special[token])))
            self._extend(self._special[token])
        else:
            self._ids.append(token)
            now = self._decode(self._ids[self._prefix :])
            finished = now.rstrip(_UNFINISHED)
            if len(finished) > self._taken:
                self._extend(finished[self._taken :])
                self._taken = len(finished)
            if now == finished and len(now) > len(self._decode(self._ids[self._prefix : self._read])):
                self._prefix, self._read = self._read, len(self._ids)
                self._taken = len(self._decode(self._ids[self._prefix :]))
        return self._show(len(self._whole) if self.stopped else len(self._whole) - self._held())

    def finish(self) -> str:
        """Return what was held back."""
        if not self.stopped:
            self._extend(self._decode(self._ids[self._prefix :])[self._taken :])
        return self._show(len(self._whole))

    def _extend(self, piece: str) -> None:
        searched = max(0, len(self._whole) - max((len(s) for s in self._stop), default=0))
        self._whole += piece
        found = [at for s in self._stop if (at := self._whole.find(s, searched)) >= 0]
        if found:
            self._whole, self.stopped = self._whole[: min(found)], True
            self._hidden = [(a, min(n, len(self._whole) - a)) for a, n in self._hidden if a < len(self._whole)]

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        ends = (n for s in self._stop for n in range(len(s) - 1, 0, -1) if self._whole.endswith(s[:n]))
        return max(ends, default=0)

    def _show(self, until: int) -> str:
        until -= sum(min(length, until - start) for start, length in self._hidden if start < until)
        piece, self._shown = self.text[self._shown : until], max(self._shown, until)
        return piece

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _special_texts(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that decoding leaves out, with their texts."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if getattr(token, "special", False)}
    return {int(i): str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids} | added
