"""Telling the caller of layers that are done, and of an answer's text as its tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from apb.decode.base import DecodeRequest
from apb.decode.text import TextStream


class Teller:
    """Turns the hosts' events into pieces of text; ``first_s`` is the clock's time at the first token."""

    def __init__(self, tokenizer: Any, request: DecodeRequest, on_token: Callable[[str], None] | None) -> None:
        self.first_s: float | None = None
        self._stream = TextStream(tokenizer, request.stop)
        self._stop_ids, self._on_token = request.stop_ids, on_token

    def event(self, event: dict[str, Any]) -> None:
        """Take a decided token; stop tokens have no text."""
        if self.first_s is None:
            self.first_s = time.perf_counter()
        self._tell("" if event["id"] in self._stop_ids else self._stream.push(event["id"]))

    def finish(self) -> str:
        """Tell the text held back so far and return all of it."""
        self._tell(self._stream.finish())
        return self._stream.text

    def _tell(self, piece: str) -> None:
        if piece and self._on_token is not None:
            self._on_token(piece)


def layer_events(on_layer: Callable[[int, int], None] | None) -> Callable[[dict[str, Any]], None] | None:
    """Return a listener that hands layers done and in all to ``on_layer``; None for none."""
    if on_layer is None:
        return None
    return lambda event: on_layer(event["done"], event["total"])
