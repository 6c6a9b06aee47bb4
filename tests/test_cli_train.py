"""``apb train retaining_heads``: from a text to heads that ``apb ask`` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import saved_llama

pytest_plugins = ("tests.command",)
SMALL = ("prompts=2", "held_out=1", "shortest=200", "longest=250", "hidden=8", "epochs=1", "dtype=float32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text long enough to draw documents from; its name has a space and '='."""
    file = tmp_path / "a text = long.txt"
    file.write_text(
        "\n\n".join(f"The king of hill {i} sees the sea. Then he sees the stars of {i}." for i in range(200))
    )
    return file


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with positions enough for any prompt."""
    return saved_llama(tmp_path_factory.mktemp("roomy"))


@pytest.mark.parametrize("method", ["mlp", "ridge"])
def test_train_and_use(apb: Any, ask: Any, roomy: str, text: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out, here"
    words = ("train", "retaining_heads", "-d", str(text), f"model={roomy}", f"out={out}", f"method={method}", *SMALL)
    ran = apb(*words)
    assert ran.code == 0, ran.err
    found = ran.document
    assert Path(found["file"]) == out / "heads.safetensors" and found["method"] == method
    assert found["hidden"] == (8 if method == "mlp" else 0)
    assert {"plain", "embedded"} <= set(found["recall"]["ridge"]) and "random" in found["recall"]
    assert "Held-out recall" in ran.err and "Labelling prompts" in ran.err
    again = apb(*words)
    assert again.document["recall"] == found["recall"] and "Labelling" not in again.err
    asked = ask("strategy=apb", "cluster.hosts=3", "compress=retaining", f"compress.heads={found['file']}").document
    assert asked["plan"]["compressor"] == "retaining" and asked["token_ids"]
    apb(*words, "seed=1").refused("another job", "seed=1")


def test_what_training_refuses(apb: Any, ask: Any, model: Path, document: Path, text: Path, tmp_path: Path) -> None:
    words = ("train", "retaining_heads", f"model={model}", f"out={tmp_path / 'out'}", *SMALL)
    apb("train", "retaining_head", f"model={model}").refused("Did you mean retaining_heads")
    apb("train", "one", "two").refused("'two'")
    apb(*words, "-q", "Why?").refused("takes no -q")
    apb(*words, "method=magic").refused("method")
    apb(*words, "method=mlp", "prompts=0").refused("prompts=0")
    apb(*words, "shortest=300").refused("shortest=300")
    apb(*words, "threads=0").refused("threads=0")
    apb(*words, "-d", str(document)).refused("too short")
    apb(*words, "-d", str(text), "longest=4000", "shortest=4000", f"out={tmp_path / 'other'}").refused(
        "longest", "600 positions"
    )
    ask("compress=retaining").refused("belong to another model")
    ask("compress=retaining", f"compress.heads={tmp_path / 'nowhere'}").refused("no retaining heads")
