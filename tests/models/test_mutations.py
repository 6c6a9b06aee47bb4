"""Damaged model folders end as a user's error that names the file, soon; what they claim is not allocated."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers

from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from burst.errors import UserError
from tests.models.mutations import Mutation, mutations
from tests.support.tiny import build, byte_tokenizer

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good folders: one file of tensors, several, and the older format."""
    made = {name: tmp_path_factory.mktemp("good") / name for name in ("one", "shards", "pickle")}
    model = build(transformers.LlamaConfig(**SIZES))
    for name, folder in made.items():
        model.save_pretrained(folder, max_shard_size="60KB" if name == "shards" else "1GB")
        byte_tokenizer().save_pretrained(folder)
        (folder / "lamp.py").write_text("open('CODE_RAN', 'w').write('run')")
    torch.save(model.state_dict(), made["pickle"] / "pytorch_model.bin")
    (made["pickle"] / "model.safetensors").unlink()
    return made


def ask(folder: Path) -> str:
    """Plan and load as a command would, and answer with two tokens."""
    setup = Setup.make(EngineOptions(model=str(folder), hosts=1, strategy="full"))
    prompt = setup.prompt("The red lamp was lit by Orrin.", "Who lit it?")
    setup.plan(prompt, 2)
    with Engine.launch(setup) as engine:
        return engine.generate(engine.prefill(prompt), max_new_tokens=2).finish_reason


def tried(folder: Path, change: Mutation, place: Path) -> str:
    """Return what comes of a changed copy: ok, or the error; anything but a user's error fails the test."""
    name, edit = change
    copied = shutil.copytree(folder, place / "m")
    try:
        edit(copied)
        started = time.process_time()
        try:
            return ask(copied)
        except UserError as error:
            assert error.remedy and error.allowed, name
            return str(error)
        finally:
            assert time.process_time() - started < 5, name
            assert not list(copied.glob("CODE_RAN")), name
    finally:
        shutil.rmtree(copied)


def test_good_folders_are_good(folders: dict[str, Path]) -> None:
    assert {ask(folder) for folder in folders.values()} <= {"length", "stop"}


@pytest.mark.parametrize("kind", ["one", "shards", "pickle"])
def test_mutated_folders(kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    every = list(mutations(folders[kind], 1))
    found = [tried(folders[kind], change, tmp_path) for change in random.Random(2).sample(every, 20)]
    assert not (tmp_path / "CODE_RAN").exists()
    assert any(text not in ("length", "stop") for text in found)


NAMED = [
    ("one", "config.json ('num_hidden_layers',) = '0'", "config.json"),
    ("one", "config.json ('num_hidden_layers',) = '1000000000'", "config.json"),
    ("one", "config.json ('hidden_size',) = '1000000000'", "model.safetensors"),
    ("one", "config.json ('eos_token_id',) = '3.7'", "config.json"),
    ("one", "config.json stray num_labels", "config.json"),
    ("one", "config.json is '[[[[[[[['", "config.json"),
    ("one", "generation_config.json stray eos_token_id", "generation_config.json"),
    ("one", "generation_config.json a pipe", "generation_config.json"),
    ("one", "tokenizer.json three gigabytes of nothing", "tokenizer.json"),
    ("one", "chat_template.jinja three gigabytes of nothing", "chat_template.jinja"),
    ("one", "chat_template.jinja a pipe", "chat_template.jinja"),
    ("one", "tokenizer_config.json a device", "tokenizer_config.json"),
    ("one", "model.safetensors a pipe", "model.safetensors"),
    ("one", "model.safetensors length 18446744073709551615", "model.safetensors"),
    ("one", "model.safetensors header b'[[[[['", "model.safetensors"),
    ("one", "model.safetensors shape = [1000000000000, 1000000]", "model.safetensors"),
    ("one", "model.safetensors data_offsets = [0, 1000000000000000]", "model.safetensors"),
    ("shards", "model.safetensors.index.json ('weight_map',) dropped", "model.safetensors.index.json"),
    ("shards", "model-00002-of-00003.safetensors gone", "model-00002-of-00003.safetensors"),
    ("pickle", "pytorch_model.bin runs code", "pytorch_model.bin"),
    ("pickle", "pytorch_model.bin runs code as torch saves", "pytorch_model.bin"),
    ("pickle", "pytorch_model.bin packed", "pytorch_model.bin"),
    ("pickle", "pytorch_model.bin far wider than its numbers", "pytorch_model.bin"),
    ("pickle", "pytorch_model.bin empty", "pytorch_model.bin"),
]


@pytest.mark.parametrize(("kind", "name", "file"), NAMED)
def test_the_damaged_file_is_named(kind: str, name: str, file: str, folders: dict[str, Path], tmp_path: Path) -> None:
    change = next(change for change in mutations(folders[kind], 1) if change[0] == name)
    assert f"/{file} " in tried(folders[kind], change, tmp_path)


@pytest.mark.parametrize("value", ["dropped", "= 'None'", "= '[]'"])
def test_an_index_without_metadata_is_good(value: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name = f"model.safetensors.index.json ('metadata',) {value}"
    change = next(change for change in mutations(folders["shards"], 1) if change[0] == name)
    assert tried(folders["shards"], change, tmp_path) in ("length", "stop")
