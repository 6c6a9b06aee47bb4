"""``apb train eagle`` and ``apb train frequency``: from a text to a head and lists that can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apb.draft import load, vocab
from apb.host.load import load_adapter
from apb.host.messages import HostSpec
from tests.support.tiny import VOCAB, saved_llama

pytest_plugins = ("tests.support.command",)
SMALL = ("prompts=4", "held_out=1", "longest=12", "epochs=1", "batch=200", "window=32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text to take passages from; its name has a space and '='."""
    file = tmp_path / "a text = long.txt"
    file.write_text("".join(f"The king of hill {i} sees the sea. Then he sees the stars of {i}.\n" for i in range(200)))
    return file


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with positions enough for any prompt."""
    return saved_llama(tmp_path_factory.mktemp("roomy"))


def test_train_eagle_and_count_its_answers(apb: Any, roomy: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out, here"
    words = ("train", "eagle", "-d", str(text), f"model={roomy}", f"out={out}", *SMALL)
    ran = apb(*words)
    assert ran.code == 0, ran.err
    found = ran.document
    assert Path(found["file"]) == out / "head.safetensors" and found["job"]["dtype"] == "bfloat16"
    assert found["accepted_length"] >= 1.0 and set(found["accepted"]["full"]) == {"general", "math", "code"}
    assert "Accepted length" in ran.err and "Training the head" in ran.err
    again = apb(*words)
    assert again.document["accepted"] == found["accepted"] and "Asking" not in again.err
    head = load(found["file"], load_adapter(HostSpec(roomy, "float32", "cpu")).draft_target())
    assert head.window == 32 and head.about["model"] == roomy
    apb(*words, "seed=1").refused("another job", "seed=1")
    lists = tmp_path / "lists"
    counting = ("train", "frequency", "-d", found["answers"], f"model={roomy}", f"out={lists}", "vocab=[100]")
    counted = apb(*counting).document
    ranked = vocab.load(Path(found["frequency"]), VOCAB, counted["stop_ids"])
    assert vocab.load(lists / "freq_100.pt", VOCAB, counted["stop_ids"]).tolist() == ranked[:100].tolist()


def test_training_goes_on_from_a_head_behind_long_texts(apb: Any, roomy: str, text: Path, tmp_path: Path) -> None:
    words = ("train", "eagle", "-d", str(text), f"model={roomy}", *SMALL)
    first = apb(*words, f"out={tmp_path / 'the first, a=b'}").document
    more = (*words, "prompts=130", f"start={first['file']}", f"out={tmp_path / 'more'}")
    ran = apb(*more, "behind=300", "lr=1e-9")
    assert ran.code == 0, ran.err
    target = load_adapter(HostSpec(roomy, "float32", "cpu")).draft_target()
    begun, ended = load(first["file"], target), load(ran.document["file"], target)
    far = max(float((a - b).abs().max()) for a, b in zip(begun.parameters(), ended.parameters(), strict=True))
    assert far < 1e-2 < float(begun.fc.weight.std())  # the types of both files, and hardly a step
    assert ran.document["job"]["start_sha256"] is not None and "behind" in ran.err
    behind = [name for name in ran.document["accepted"]["static"] if " behind " in name]
    assert [name.split()[0] for name in behind] == ["general", "math", "code"]
    apb(*more).refused("another job", "behind=0")
    other = f"out={tmp_path / 'other'}"
    apb(*words, "behind=100000", other).refused("behind is out of range", "behind=100000")
    assert apb(*words, other).code == 0  # the folder was not taken
    apb(*words, f"start={tmp_path / 'absent'}").refused("there is no draft head")


def test_train_frequency_of_a_text(apb: Any, roomy: str, text: Path, tmp_path: Path) -> None:
    words = ("train", "frequency", "-d", str(text), f"model={roomy}")
    ran = apb(*words, f"out={tmp_path}", "vocab=[16,64]")
    found = ran.document
    assert [Path(f).name for f in found["files"]] == [
        f"freq_{n}.{suffix}" for n in (16, 64) for suffix in ("pt", "safetensors")
    ]
    published = torch.load(tmp_path / "freq_64.pt", weights_only=True)
    assert len(published) == 64 and set(found["stop_ids"]) <= set(published[:16])
    assert 0 < found["coverage"]["16"] < found["coverage"]["64"] <= 1 and "Tokens of the corpus" in ran.err
    apb(*words, "vocab=[0]").refused("out of range", "vocab=[0]")
    apb(*words, f"vocab=[{VOCAB + 1}]").refused(f"1 to {VOCAB}")
    apb(*words, "vocab=[]").refused("out of range")
    (tmp_path / "wrong.safetensors").write_bytes(b"none")
    wrong = ("train", "frequency", "-d", str(tmp_path / "wrong.safetensors"), f"model={roomy}", "vocab=[10]")
    apb(*wrong).refused("cannot be counted")


def test_what_training_refuses(apb: Any, roomy: str, text: Path, tmp_path: Path) -> None:
    words = ("train", "eagle", f"model={roomy}", f"out={tmp_path / 'out'}", *SMALL)
    apb("train", "eagles", f"model={roomy}").refused("Did you mean eagle")
    for wrong in ("prompts=0", "longest=1", "window=2", "sinks=-1", "unrolled=2", "epochs=0", "threads=0"):
        apb(*words, "-d", str(text), wrong).refused(wrong.split("=")[0])
