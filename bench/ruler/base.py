"""A benchmark sample: a document of exact length, a question about it, and what answers it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from burst.errors import UserError

Match = Literal["all", "part"]  # every answer must be found, or any one of them


@dataclass(frozen=True)
class Ask:
    """A question, the beginning of the answer that is put into the model's mouth, and the right answers."""

    question: str
    prefix: str
    answers: tuple[str, ...]
    match: Match = "all"
    new_tokens: int = 32  # longest answer to decode

    @property
    def target(self) -> str:
        """The right answer as text after ``prefix``: what log-probabilities are taken of."""
        return " " + (", ".join(self.answers) if self.match == "all" else self.answers[0])


@dataclass(frozen=True)
class RulerSample:
    """One document with its question; ``second`` asks for something else in the same document.

    Without ``chat`` the document is continued as plain text, and nothing is decoded.
    """

    task: str
    seed: str  # what its random numbers come from; the same seed gives the same sample
    document: tuple[int, ...]
    ask: Ask
    second: Ask | None = None
    chat: bool = True


class Encode(Protocol):
    """Text to token ids; nothing in the text is a special token."""

    def __call__(self, text: str) -> list[int]:
        """Return the token ids."""


Room = Callable[[Ask], int]  # tokens that the document may have beside that question


class Family(Protocol):
    """A task family: its fields are its difficulty."""

    def make(self, encode: Encode, room: Room, rng: random.Random) -> tuple[list[int], Ask, Ask | None]:
        """Return a document of exactly ``room(ask)`` tokens, the question, and a second one if there is one."""


def encoder(tokenizer: Any) -> Encode:
    """Return the tokenizer's plain encoding."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        return ids

    return encode


def mix(
    intro: list[int],
    planted: Iterable[list[int]],
    filler: Iterable[list[int]],
    room: int,
    rng: random.Random,
    *,
    shuffle: bool = True,
) -> list[int]:
    """Return ``intro`` and filler units with ``planted`` units between them, exactly ``room`` tokens.

    ``filler`` must be long enough; its last unit is cut to fit. Planted units stand at random depths, in their own
    order unless ``shuffle``. Raises UserError when there is no room for them.
    """
    units = list(planted)
    if shuffle:
        rng.shuffle(units)
    left = room - len(intro) - sum(map(len, units))
    if left < 0:
        raise too_short(room, room - left)
    fill: list[list[int]] = []
    for unit in filler:
        fill.append(unit[:left])
        left -= len(fill[-1])
        if not left:
            break
    assert not left, "the filler ended too early"
    depths = sorted(rng.randrange(len(fill)) if fill else 0 for _ in units)
    out = list(intro)
    for i, unit in enumerate(fill or [[]]):
        while depths and depths[0] == i:
            depths.pop(0)
            out += units.pop(0)
        out += unit
    assert len(out) == room and not units
    return out


def too_short(room: int, needed: int) -> UserError:
    """Return the error for a document that cannot hold what the task plants in it."""
    return UserError(
        "this task does not fit into so few tokens",
        given=f"room for {room} document tokens",
        allowed=f"{needed} or more",
        remedy=f"Raise bench.tokens by {needed - room} or more, or leave the task out of bench.tasks.",
    )
