"""The document and the question: the user's own, or Python's language reference with a fact planted in it."""

from __future__ import annotations

import sys
from pathlib import Path

from burst.errors import UserError
from launch.terminal.arguments import Arguments

# A name that occurs nowhere else and a number that cannot be guessed: only reading finds it.
FACT = "The secret number of the Velmora lighthouse is 7391846."
QUESTION = "What is the secret number of the Velmora lighthouse?"
BUDGET_CHARS = 25_500  # about 6,000 tokens of the embedded model
# Hundreds of millions of tokens, more than any model's positions; it also ends pipes and devices that never do.
LIMIT_BYTES = 10**9


def read(arguments: Arguments, depth: float) -> tuple[str, str]:
    """Return document and question; raises UserError when either is missing, unreadable or empty."""
    query = arguments.query
    if query is not None:
        _check_text(query, "the question")
        if not query.strip():
            raise UserError(
                "the question is empty",
                given=f"-q {query!r}",
                allowed="some text",
                remedy="Write a question after -q.",
            )
    if arguments.document is None:
        return default_document(depth), QUESTION if query is None else query
    if query is None:
        raise UserError(
            "a document needs a question",
            given=f"-d {arguments.document}",
            allowed="-d FILE -q TEXT",
            remedy='Add a question: -q "What is this about?"',
        )
    if arguments.text is None:
        arguments.text = _read_file(arguments.document)
    return arguments.text, query


def corpus(arguments: Arguments) -> str:
    """Return the text of -d, or all of Python's language reference; raises UserError when it is unreadable or empty."""
    if arguments.document is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name].strip() for name in sorted(topics))
    if arguments.text is None:
        arguments.text = _read_file(arguments.document)
    return arguments.text


def default_document(depth: float) -> str:
    """Return the reference texts of Python's own help, by name, with FACT after ``depth`` of their length.

    The same for a given version of Python; later versions word some texts anew.
    """
    from pydoc_data.topics import topics

    paragraphs: list[str] = []
    length = 0
    for name in sorted(topics):
        for paragraph in topics[name].strip().split("\n\n"):
            length += len(paragraph) + 2
            if length > BUDGET_CHARS:
                return _planted(paragraphs, depth)
            paragraphs.append(paragraph)
    return _planted(paragraphs, depth)


def _planted(paragraphs: list[str], depth: float) -> str:
    target = depth * sum(len(p) + 2 for p in paragraphs)
    before, at = 0, 0
    while at < len(paragraphs) and before + len(paragraphs[at]) / 2 < target:
        before += len(paragraphs[at]) + 2
        at += 1
    return "\n\n".join([*paragraphs[:at], FACT, *paragraphs[at:]])


def _read_file(name: str) -> str:
    where = "standard input" if name == "-" else f"the document '{name}'"
    try:
        if name == "-" and sys.stdin is None:
            raise OSError("it is closed")
        if name == "-":
            data = sys.stdin.buffer.read(LIMIT_BYTES + 1)
        else:
            with Path(name).open("rb") as stream:
                data = stream.read(LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
        if isinstance(error, IsADirectoryError):
            reason = "it is a folder"
        raise UserError(
            f"{where} cannot be read: {reason}",
            given=f"-d {name}",
            allowed="a readable text file, or - for standard input",
            remedy="Check the path and its permissions.",
        ) from error
    if len(data) > LIMIT_BYTES:
        raise UserError(
            f"{where} is longer than {LIMIT_BYTES:,} bytes",
            given=f"-d {name}",
            allowed=f"up to {LIMIT_BYTES:,} bytes of text",
            remedy="Cut the document to what the model can hold; 'apb plan' shows how much that is.",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(where, name, f"byte {error.start} is not UTF-8") from error
    if "\0" in text:
        raise _not_text(where, name, "it holds NUL bytes")
    if not text.strip():
        raise UserError(
            f"{where} is empty",
            given=f"-d {name}",
            allowed="a file with text",
            remedy="Give a document with words in it.",
        )
    return text


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
        raise UserError(
            f"{what} is not valid UTF-8",
            given=ascii(text),
            allowed="UTF-8 text",
            remedy="Set the terminal to UTF-8, or give the text through a file.",
        ) from error


def _not_text(where: str, name: str, reason: str) -> UserError:
    return UserError(
        f"{where} is not plain text: {reason}",
        given=f"-d {name}",
        allowed="UTF-8 text",
        remedy="Convert it first (pdftotext for PDF, iconv for other encodings).",
    )
