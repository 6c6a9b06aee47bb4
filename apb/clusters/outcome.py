"""Outcomes of a call on each host, carried between processes, and of the call as a whole."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from burst.errors import HostFailure, UserError


@dataclass(frozen=True)
class Outcome:
    """One host's result, or the exception that ended its call; travels between processes."""

    value: Any = None
    error: Exception | None = None

    @property
    def breaks(self) -> bool:
        """True where the host's peers may be left waiting for it: anything but a result or a user's mistake."""
        return self.error is not None and not isinstance(self.error, UserError)


def attempt(fn: Callable[[], Any]) -> Outcome:
    """Run ``fn`` and catch what it raises, with the traceback as a note since that does not travel."""
    try:
        return Outcome(value=fn())
    except Exception as error:
        if not isinstance(error, UserError | HostFailure):
            error.add_note(f"on the host:\n{traceback.format_exc()}")
        return Outcome(error=_portable(error))


def _portable(error: Exception) -> Exception:
    """Return the exception as it travels, or a RuntimeError that says the same when it cannot be pickled."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
        for note in getattr(error, "__notes__", []):
            if note not in getattr(copy, "__notes__", []):
                copy.add_note(note)
        return copy
    except Exception:  # whatever a foreign exception's own pickling raises
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", []):
            plain.add_note(note)
        return plain


def values(outcomes: Mapping[int, Outcome]) -> list[Any]:
    """Return the results by rank, or raise what explains the others: a mistake, then a bug, then a failure.

    A host that stops leaves its peers with failures of their own, so theirs come last.
    """
    in_order = [outcomes[r] for r in sorted(outcomes)]
    errors = [o.error for o in in_order if o.error is not None]
    if errors:
        raise min(errors, key=_consequence)
    return [o.value for o in in_order]


def _consequence(error: Exception) -> int:
    return 0 if isinstance(error, UserError) else 2 if isinstance(error, HostFailure) else 1


def intact(outcomes: Mapping[int, Outcome], hosts: int) -> bool:
    """Return True where the hosts can go on together: all gave a result, or all met a mistake.

    Where only some stopped, messages may be left between them.
    """
    if len(outcomes) < hosts or any(o.breaks for o in outcomes.values()):
        return False
    return len({o.error is None for o in outcomes.values()}) == 1
