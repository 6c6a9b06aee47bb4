"""Prompt lookup: where drafts come from without a head."""

from __future__ import annotations

import torch

from apb.decode.lookup import Matcher


def test_lookup_finds_what_followed_the_longest_match() -> None:
    matcher = Matcher(torch.tensor([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]), 2)
    assert [matcher.after(place, 2) for place in matcher.places()] == [[4, 9], [5, 1]]
    matcher.extend([7])
    assert matcher.places() == [] and matcher.continuation(4) == []
    matcher.extend([2, 3])  # the latest of equally long matches first
    assert [matcher.after(place, 1) for place in matcher.places()] == [[7], [5], [4]]
    cycle = Matcher(torch.arange(5000) % 7, 2)
    cycle.extend([i % 7 for i in range(5000, 9000)])  # more than was made room for
    assert cycle.continuation(1) == [9000 % 7]
    assert cycle.after(cycle.places()[-1], 5) == [(9000 + i) % 7 for i in range(5)]


def test_loops_go_on_and_long_texts_are_looked_through_in_bounds() -> None:
    assert Matcher(torch.zeros(50, dtype=torch.int64), 1).continuation(8) == [0] * 8
    assert Matcher(torch.arange(30) % 3, 2).continuation(7) == [0, 1, 2, 0, 1, 2, 0]
    assert len(Matcher(torch.zeros(10_000, dtype=torch.int64), 1).places()) <= 64
