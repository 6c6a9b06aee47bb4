"""Models on disk: what names mean, the hub, loading, damaged files. Needs no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from apb.models import (
    generation_stop_ids,
    load_model,
    load_tokenizer,
    resolve,
)
from apb.models.fetch import hub
from burst.errors import UserError


@pytest.fixture
def folder(tiny_llama_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be damaged."""
    return shutil.copytree(tiny_llama_path, tmp_path / "model")


# Names


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, apb.models; print({'transformers', 'ray', 'hydra', 'rich'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_a_local_folder_resolves_to_itself(tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tiny_llama_path)) == tiny_llama_path
    monkeypatch.chdir(tiny_llama_path.parent.parent)
    assert resolve(f"{tiny_llama_path.parent.name}/tiny-llama") == tiny_llama_path  # not taken for a hub id


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("smolm2-135", "unknown model", "Did you mean smollm2-135m?"),
        ("SmolLM2-135M", "unknown model", "Did you mean smollm2-135m?"),
        ("zzz", "unknown model", "Choose one of"),
        ("", "unknown model", "Choose one of"),
        ("/no/such/folder", "does not exist", "Check the path."),
        ("./tiny-lama", "does not exist", "Did you mean tiny-llama?"),
        (".", "has no config.json", "tiny-llama"),
        ("tiny-llama/config.json", "is a file", "Give the folder"),
    ],
)
def test_wrong_names_say_what_to_change(
    name: str, message: str, remedy: str, tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama_path.parent)
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert message in caught.value.message
    assert remedy in caught.value.remedy
    assert "smollm2-135m" in str(caught.value.allowed)


# The hub


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), HTTPError("no route"), ValueError("no route"), RuntimeError("no route")]
)
def test_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"could not be fetched .* no route") as caught:
        resolve("some-org/some-model")
    assert "give its path" in caught.value.remedy
    assert str(caught.value).count("could not be fetched") == 1


def test_a_bug_is_not_taken_for_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(AttributeError, match="a bug"):
        resolve("some-org/some-model")


def test_hub_lost_while_fetching_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*args: object, **options: object) -> None:
        raise LocalEntryNotFoundError("connection lost, and nothing is cached")

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lose)
    with pytest.raises(UserError, match=r"could not be fetched .* connection lost"):
        resolve("some-org/some-model")


def test_hub_out_of_reach_falls_back_to_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only: str(tmp_path))
    assert resolve("some-org/some-model") == tmp_path


def test_unknown_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **options: object) -> None:
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    with pytest.raises(UserError, match="does not exist on the Hugging Face hub"):
        resolve("some-org/some-model")


@pytest.mark.parametrize(
    ("files", "takes_bin"),
    [(["model.safetensors", "pytorch_model.bin"], False), (["pytorch_model.bin"], True)],
)
def test_hub_download_takes_one_kind_of_weights(
    files: list[str], takes_bin: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        seen.update(options)
        with options["tqdm_class"](desc="Downloading bytes", total=0, unit="B", unit_scale=True) as bar:
            bar.total = 10
            bar.update(10)
            bar.refresh()
        return str(tmp_path)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    calls: list[tuple[str, int, int]] = []
    assert hub.download("org/name", lambda *call: calls.append(call)) == tmp_path
    assert ("*.bin" in seen["allow_patterns"]) is takes_bin
    assert calls[-1] == ("Fetching org/name", 10, 10)


# Loading


def test_load_model(tiny_llama_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(tiny_llama_path, dtype="auto", device="cpu")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert load_model(tiny_llama_path, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load_model(tiny_llama_path, dtype="float64", device="cpu").dtype == torch.float64
    assert generation_stop_ids(model) == generation_stop_ids(tiny_llama_path) == (2,)
    assert capfd.readouterr() == ("", "")


def test_stop_ids_are_the_union(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 2], "text_config": {"eos_token_id": 9}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert generation_stop_ids(tmp_path) == (2, 0, 7, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat"}, "Did you mean bfloat16"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"device": "gpu"}, "unknown device"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "cpu:3"}, "no such device name.*cpu:3.*Set device=cpu"),
        ({"device": "cpu:"}, "no such device name"),
        ({"device": "auto:0"}, "no such device name"),
        ({"device": "cuda:"}, "no such device name.*cuda:"),
        ({"device": "cuda:-1"}, "no such device name"),
        ({"device": "cuda:\u0663"}, "no such device name"),  # a digit, but none that torch reads
        ({"device": "cuda:00"}, "no such device name"),
    ],
)
def test_wrong_dtype_or_device(options: dict[str, str], message: str, tiny_llama_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_model(tiny_llama_path, **({"dtype": "float32", "device": "cpu"} | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(tiny_llama_path: Path) -> None:
    with pytest.raises(UserError, match="cuda"):
        load_model(tiny_llama_path, dtype="float32", device="cuda")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused_by_name(keep: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{file} is damaged") as caught:
        load_model(folder, dtype="float32", device="cpu")
    assert "again" in caught.value.remedy


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_broken_json_is_refused_by_name(name: str, folder: Path) -> None:
    (folder / name).write_text('{"a":')
    with pytest.raises(UserError, match=str(folder / name)):
        load_tokenizer(folder) if name == "tokenizer.json" else load_model(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3.*more"),
        ({"intermediate_size": 128}, "another shape for the tensor model.layers"),
        ({"model_type": "nothing"}, "config.json cannot be used"),
        ({"hidden_size": "wide"}, "config.json cannot be used"),
    ],
)
def test_config_that_does_not_fit_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_model(folder, dtype="float32", device="cpu")


def test_missing_tensors_are_never_random(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{file}.*lacks the tensor model.norm.weight"):
        load_model(folder, dtype="float32", device="cpu")


def test_shards(folder: Path) -> None:
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    shards = {"model-1.safetensors": dict(tensors[::2]), "model-2.safetensors": dict(tensors[1::2])}
    for name, part in shards.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    placed = {tensor: name for name, part in shards.items() for tensor in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    load_model(folder, dtype="float32", device="cpu")

    save_file(dict(tensors[1:-2:2]), folder / "model-2.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model-2.safetensors is damaged: the tensor .* is missing"):
        load_model(folder, dtype="float32", device="cpu")
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2.safetensors is damaged: it is missing"):
        load_model(folder, dtype="float32", device="cpu")
    index.write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        load_model(folder, dtype="float32", device="cpu")
    index.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_model(folder, dtype="float32", device="cpu")


def test_a_folder_without_a_tokenizer(tiny_llama_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tiny_llama_path)


@pytest.mark.gpu
def test_load_on_a_gpu(tiny_llama_path: Path) -> None:
    assert load_model(tiny_llama_path, dtype="bfloat16", device="cuda").device.type == "cuda"
