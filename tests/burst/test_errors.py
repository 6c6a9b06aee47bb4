"""What errors show of a value."""

from __future__ import annotations

import pickle

import pytest

from burst.errors import UserError


@pytest.mark.parametrize(
    ("given", "says"),
    [("", "(empty)"), (None, "(empty)"), ([], "(empty)"), ({}, "(empty)"), ("\n ", r"'\n '"), (0, "0"), ("a", "a")],
)
def test_given_is_never_empty(given: object, says: str) -> None:
    error = UserError("wrong", given=given, allowed="right", remedy="Mend it.")
    assert str(error.given) == str(pickle.loads(pickle.dumps(error)).given) == says
    assert f"(given: {says};" in str(error)
