"""What the tests of the command line share: a tiny model, a document, and what a command came to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from apb.engine.setup import Setup
from launch.cli import main
from tests.support.tiny import build, byte_tokenizer, llama_config

CONTEXT = 600  # positions of the tiny model
KEYS = {
    *("answer", "token_ids", "model", "strategy", "cluster", "hosts", "context_tokens", "query_tokens"),
    *("prefill_s", "ttft_s", "decode_tokens_per_s", "bytes_sent", "bytes_by_kind", "host_work_s"),
    *("peak_rss_bytes", "accepted_length", "plan", "versions"),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer; its path has a space and '='."""
    folder = tmp_path_factory.mktemp("models") / "tiny = llama, really"
    build(llama_config(max_position_embeddings=CONTEXT)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A document of some two hundred tokens."""
    file = tmp_path / "document.txt"
    file.write_text("the king of the hill sees the sea. " * 9)
    return file


@dataclasses.dataclass
class Ran:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document: the only line on stdout."""
        (line,) = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        return found

    def refused(self, *words: str) -> dict[str, str]:
        """Check the shape of a user's error that contains ``words``, on both streams, and return it."""
        assert self.code == 2, (self.out, self.err)
        error = self.document["error"]
        assert set(error) == {"type", "given", "allowed", "remedy", "message"}
        assert error["type"] == "UserError" and all(isinstance(v, str) for v in error.values())
        for word in words:
            assert word in " ".join(error.values()), error
        assert error["message"] in self.err and "Traceback" not in self.err
        found: dict[str, str] = error
        return found


@pytest.fixture
def apb(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in an empty working directory, and check that it leaves nothing there."""
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*argv: str) -> Ran:
        code = main(list(argv))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    yield run
    assert list(here.iterdir()) == []


@pytest.fixture
def ask(apb: Any, model: Path, document: Path) -> Any:
    """Run ``apb ask`` on the tiny model and document with further arguments."""
    given = ("ask", f"model={model}", "cluster=virtual", "decode.max_new_tokens=4")
    return lambda *argv: apb(*given, "-d", str(document), "-q", "Who sees?", *argv)


class Seen(Exception):
    """Ends a command once its prompt is made."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The documents and questions that commands tokenise."""
    found: list[tuple[str, str]] = []

    def prompt(self: Setup, context: str, query: str, **options: Any) -> None:
        found.append((context, query))
        raise Seen

    monkeypatch.setattr(Setup, "prompt", prompt)
    return found
