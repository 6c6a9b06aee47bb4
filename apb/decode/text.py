"""Token ids to text as they come, with stop strings."""

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
        self._ids: list[int] = []
        self._prefix = 0  # tokens before this one are decoded for good
        self._read = 0
        self._shown = 0
        self.text = ""  # decoded so far, cut at a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown now."""
        self._ids.append(token)
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            self._extend(now[len(before) :])
            self._prefix, self._read = self._read, len(self._ids)
        return self._show(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """Return what was held back."""
        if not self.stopped:
            before = self._decode(self._ids[self._prefix : self._read])
            self._extend(self._decode(self._ids[self._prefix :])[len(before) :])
        return self._show(len(self.text))

    def _extend(self, piece: str) -> None:
        searched = max(0, len(self.text) - max((len(s) for s in self._stop), default=0))
        self.text += piece
        found = [at for s in self._stop if (at := self.text.find(s, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        ends = (n for s in self._stop for n in range(len(s) - 1, 0, -1) if self.text.endswith(s[:n]))
        return max(ends, default=0)

    def _show(self, until: int) -> str:
        piece, self._shown = self.text[self._shown : until], max(self._shown, until)
        return piece

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
