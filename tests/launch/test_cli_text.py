"""Documents, questions and stop texts come through the command line unharmed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.cli import main
from launch.terminal.document import FACT, default_document
from tests.support.command import Seen

pytest_plugins = ("tests.support.command",)


TRICKY = [
    "--help",
    "-m",
    "a=b",
    "strategy=star",
    "${x}",
    "{a,b}",
    "'\"",
    "é\n\u2028☃ \U0001f600",
    "\\",
    "#",
    "a\r\nb",
]


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(
        st.one_of(st.sampled_from(TRICKY), st.text(min_size=1)).filter(lambda t: t.strip() and "\0" not in t),
        min_size=2,
        max_size=2,
    )
)
def test_any_text_reaches_the_prompt(
    texts: list[str], model: Path, seen: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    document, question = texts
    file = tmp_path_factory.mktemp("any") / "é = {a, b}.txt"
    file.write_bytes(document.encode())
    main(["ask", "-d", str(file), f"model={model}", "-q", question, "cluster=virtual"])
    assert seen.pop() == (document, question)


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_reaches_the_prompt(apb: Any, model: Path, seen: list[tuple[str, str]], text: str) -> None:
    apb("ask", f"model={model}", f"--query={text}x")
    apb("ask", f"model={model}", "--query", f"{text}x")
    assert [question for _, question in seen] == [f"{text}x"] * 2


def test_standard_input(ask: Any, seen: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "piped"
    file.write_bytes("Bonjour à tous,\r\n".encode())
    with file.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        ask("-d", "-")
    assert seen == [("Bonjour à tous,\r\n", "Who sees?")]


@pytest.mark.parametrize(
    ("override", "stop"),
    [
        ("decode.stop=a, b = {c}é", ["a, b = {c}é"]),
        ("decode.stop=['a','b c']", ["a", "b c"]),
        ('decode.stop=[\'\\n\', "it\'s, \\"so\\"" ,User:]', ["\n", 'it\'s, "so"', "User:"]),
        ("decode.stop=[]", []),
        ("decode.stop='User:'", ["User:"]),
        ('decode.stop="\\n\\n"', ["\n\n"]),
        ("decode.stop=\\n\\t\\\\n\\u00e9", ["\n\t\\né"]),
        ("decode.stop='", ["'"]),
        ("decode.stop='a' or 'b'", ["'a' or 'b'"]),
        ("decode.stop=\n\n", ["\n\n"]),
        ("decode.stop=null", []),
    ],
)
def test_stop_texts(ask: Any, monkeypatch: pytest.MonkeyPatch, override: str, stop: list[str]) -> None:
    got: list[Any] = []

    def settle(kind: Any, config: Any) -> None:
        got.append(config["decode"]["stop"])
        raise Seen

    monkeypatch.setattr("launch.verbs.prefill.ask.settle", settle)
    ask(override)
    assert got == [stop]


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_default_document(depth: float) -> None:
    text = default_document(depth)
    assert text.count(FACT) == 1 and text == default_document(depth)
    assert 20_000 < len(text) < 30_000
    assert abs(text.index(FACT) / len(text) - depth) < 0.06
