"""The errors that people see: a mistake of theirs, or a host that failed in the middle."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend: what was given, what is allowed, and what to change.

    Source: every error of this kind ends a command with exit code 2 and becomes the JSON document's ``error``.
    ``given`` is never empty: nothing, and what holds nothing, is shown as ``(empty)``, blanks as Python writes them.
    """

    def __init__(self, message: str, *, given: object, allowed: object, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.given = shown(given)
        self.allowed = allowed
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} (given: {self.given}; allowed: {self.allowed}). {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling (Ray, forked pools) without this.
        return (_rebuild, (type(self), self.message, self.given, self.allowed, self.remedy))


def shown(given: object) -> object:
    """Return what an error shows of a value: itself, or a text in its place when it would print as nothing."""
    text = str(given)
    if text.strip():
        return "(empty)" if given is None or text in ("[]", "()", "{}", "set()", "frozenset()", "b''") else given
    return repr(text) if text else "(empty)"


def _rebuild(kind: type[UserError], message: str, given: object, allowed: object, remedy: str) -> UserError:
    return kind(message, given=given, allowed=allowed, remedy=remedy)


class HostFailure(RuntimeError):
    """A host that died, stalled or disagreed: names the host (rank), the step it was in, and the peer.

    ``rank`` is the host that is believed to have failed, or the one that noticed when that is not known.
    """

    def __init__(self, message: str, *, rank: int, step: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.rank = rank
        self.step = step
        self.peer = peer

    def __str__(self) -> str:
        peer = "" if self.peer is None else f", peer host {self.peer}"
        return f"host {self.rank}, step '{self.step}'{peer}: {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_failure, (type(self), self.message, self.rank, self.step, self.peer))


def _rebuild_failure(kind: type[HostFailure], message: str, rank: int, step: str, peer: int | None) -> HostFailure:
    return kind(message, rank=rank, step=step, peer=peer)


def choose(kind: str, name: str, names: Iterable[str]) -> str:
    """Return ``name`` when it is one of ``names``; otherwise raise a UserError that gives the nearest of them."""
    known = sorted(names)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Choose one of: {', '.join(known)}."
    raise UserError(f"unknown {kind} '{name}'", given=name, allowed=", ".join(known), remedy=hint)


def in_range(key: str, value: object, fine: bool, allowed: str) -> None:
    """Raise a UserError that names ``key`` unless its ``value`` is ``fine``; ``allowed`` says what would be."""
    if not fine:
        raise UserError(f"{key} is out of range", given=f"{key}={value}", allowed=allowed, remedy=f"Change {key}.")
