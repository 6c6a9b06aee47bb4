"""Scores of decoded answers, as RULER gives them."""

from __future__ import annotations

from bench.ruler.base import Ask


def accuracy(ask: Ask, text: str) -> float:
    """Return the share of the answers that stand in ``text`` (match all), or 1.0 if any does (part); case aside.

    Source: RULER, string_match_all and string_match_part.
    """
    found = [answer.lower() in text.lower() for answer in ask.answers]
    return sum(found) / len(found) if ask.match == "all" else float(any(found))
