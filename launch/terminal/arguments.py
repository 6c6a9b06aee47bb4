"""Arguments of the command line, taken apart before Hydra sees any of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from burst.errors import UserError

_FLAGS = {
    "-m": "multirun",
    "--multirun": "multirun",
    "-h": "help",
    "--help": "help",
    "--version": "version",
    "-v": "verbose",
    "--verbose": "verbose",
}
_TEXTS = {
    "-d": "document",
    "--document": "document",
    "-q": "query",
    "--query": "query",
    "--config-dir": "presets",
}
_ALLOWED = {"document": "{0} FILE, or {0} - for stdin", "query": "{0} TEXT", "presets": "{0} DIR"}


@dataclass
class Arguments:
    """``words`` are the verb and its NAME; ``overrides`` are the ``key=value`` settings as written.

    ``presets``: a folder of presets. ``text`` is what the document was found to say: a sweep's runs share it, since a
    pipe can be read only once.
    """

    words: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    document: str | None = None
    text: str | None = None
    query: str | None = None
    presets: str | None = None
    multirun: bool = False
    help: bool = False
    version: bool = False
    verbose: bool = False


def parse(argv: Sequence[str]) -> Arguments:
    """Take the command line apart; options may stand anywhere. Raises UserError for unknown options.

    What follows -d and -q is taken as it is, whatever it looks like.
    """
    found = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if word in _FLAGS:
            setattr(found, _FLAGS[word], True)
        elif word in _TEXTS:
            if not rest:
                raise UserError(
                    f"{word} needs a value",
                    given=word,
                    allowed=_ALLOWED[_TEXTS[word]].format(word),
                    remedy=f"Write the {_TEXTS[word]} after {word}.",
                )
            setattr(found, _TEXTS[word], rest.pop(0))
        elif equals and option.startswith("--") and option in _TEXTS:
            setattr(found, _TEXTS[option], value)
        elif word.startswith("-"):
            raise _unknown_option(option)
        elif equals or word.startswith(("~", "+")):
            found.overrides.append(word)
        else:
            found.words.append(word)
    return found


def unexpected(word: str, verb: str) -> UserError:
    """Return the error for a word that is no option and no setting."""
    return UserError(
        f"'{word}' is neither an option nor a setting",
        given=word,
        allowed="options (-d FILE, -q TEXT, -m) and settings written key=value",
        remedy=f"Give a document with -d and a question, in quotes, with -q. See 'apb {verb} --help'.",
    )


def _unknown_option(option: str) -> UserError:
    known = sorted({*_FLAGS, *_TEXTS})
    near = difflib.get_close_matches(option, known, n=2, cutoff=0.5)
    return UserError(
        f"unknown option '{option}'",
        given=option,
        allowed=", ".join(known),
        remedy=f"Did you mean {' or '.join(near)}?" if near else "Settings are written key=value, without dashes.",
    )
