"""What the command line refuses, and that nothing is half done then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import CONTEXT

pytest_plugins = ("tests.support.command",)


def test_out_that_cannot_be_written(ask: Any, document: Path) -> None:
    ask(f"out={document}/below").refused("folder for results")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=abp"], ["unknown strategy 'abp'", "Did you mean apb"]),
        (["compress=quer"], ["unknown compress", "Did you mean query"]),
        (["cluster=rey"], ["Did you mean ray"]),
        (["decode=greedy"], ["unknown decode 'greedy'", "autoregressive"]),
        (["strategy="], ["unknown strategy"]),
        (["cluster.hots=3"], ["unknown key 'cluster.hots'", "cluster.hosts"]),
        (["hosts=3"], ["unknown key 'hosts'", "Did you mean cluster.hosts?"]),
        (["hydra.run.dir=x"], ["unknown key"]),
        (["strategy.name=star"], ["unknown key"]),
        (["strategy=star", "strategy.anchor_len=3"], ["has no option 'anchor_len'", "strategy=apb"]),
        (["compress.window=3"], ["compress choice that is not made", "compress=query"]),
        (["cluster.address=here:1"], ["has no option 'address'", "cluster=ray"]),
        (["cluster.hosts=abc"], ["cluster.hosts must be a whole number or null", "cluster.hosts=abc"]),
        (["cluster.hosts=2.5"], ["whole number"]),
        (["cluster.hosts=true"], ["whole number"]),
        (["cluster.hosts=[2]"], ["whole number"]),
        (["cluster.hosts=0"], ["cluster.hosts is out of range", "1 or more"]),
        (["cluster.hosts=-1"], ["1 or more"]),
        (["cluster.threads=0"], ["1 or more"]),
        (["cluster.hosts=1000"], ["more hosts than context tokens", "1000 hosts"]),
        (["cluster.hosts=2,3"], ["several values", "-m"]),
        (["chat=perhaps"], ["chat must be true or false"]),
        (["timeout_s=0"], ["timeout_s"]),
        (["dtype=float31"], ["unknown dtype", "float32"]),
        (["device=tpu"], ["tpu"]),
        (["strategy.passing=wring"], ["strategy.passing", "ring"]),
        (["strategy.anchor=once"], ["strategy.anchor", "recomputed"]),
        (["strategy=spava", "strategy.lengths=mine"], ["strategy.lengths", "published"]),
        (["strategy.anchor_len=2"], ["the anchor must hold", "strategy.anchor_len=2"]),
        (["strategy.passing_len=500"], ["passing block cannot be longer"]),
        (["strategy=star", "compress=query"], ["takes no compressor"]),
        (["strategy=full", "compress=norm"], ["takes no compressor"]),
        (["strategy=full", "cluster.hosts=4"], ["runs on one host"]),
        (["decode.max_new_tokens=0"], ["decode.max_new_tokens", "1 or more"]),
        (["decode.max_new_tokens=520"], ["longer than the model's context", f"{CONTEXT} positions"]),
        (["decode.temperature=-1"], ["decode.temperature is out of range"]),
        (["decode.temperature=warm"], ["decode.temperature must be a number"]),
        (["decode.temperature=nan"], ["decode.temperature"]),
        ([f"needle_depth=1{'0' * 400}"], ["needle_depth must be a number"]),
        (["decode.top_p=0"], ["decode.top_p is out of range"]),
        (["decode.top_k=-1"], ["decode.top_k is out of range"]),
        (["decode.seed=-1"], ["decode.seed is out of range"]),
        (["decode.stop=[1]"], ["list of texts"]),
        (["decode.stop=['a' 'b']"], ["list of texts"]),
        (["decode.stop=[a,,b]"], ["list of texts"]),
        (["decode.stop=\\end"], ["backslash", "twice"]),
        (["decode.stop=['']"], ["decode.stop"]),
        (["cluster.hosts={"], ["cannot be read"]),
        (["cluster.hosts=${nothing}"], ["cluster.hosts"]),
        (["+chat=false"], ["never added"]),
        (["~chat"], ["never added or removed"]),
        (["strategy@x=star"], ["key=value"]),
        (["--hosts=3"], ["unknown option '--hosts'"]),
        (["--documnet"], ["Did you mean --document"]),
        (["somewhere.txt"], ["neither an option nor a setting", "-d"]),
        (["-q"], ["-q needs a value"]),
        (["-q", " \n"], ["the question is empty"]),
        (["-q", "\udcff"], ["not valid UTF-8"]),
        (["-m", "cluster.hosts=interval(1,2)"], ["cannot be listed"]),
    ],
)
def test_refused(ask: Any, overrides: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.verbs.prefill.ask.Engine.launch", lambda *a, **k: pytest.fail("hosts were started"))
    ask(*overrides).refused(*words)


@pytest.mark.parametrize("name", ["smollm", "no such model", "/nowhere/at/all", "models/a/b"])
def test_unknown_models(apb: Any, document: Path, name: str) -> None:
    error = apb("ask", "-d", str(document), "-q", "Who?", f"model={name}").refused(name)
    if name == "smollm":
        assert "Did you mean smollm2-135m" in error["remedy"]


def test_documents_that_cannot_be_read(apb: Any, model: Path, tmp_path: Path) -> None:
    def refused(name: Path | str, *words: str) -> None:
        apb("ask", "-d", str(name), "-q", "Who?", f"model={model}", "cluster=virtual").refused(str(name), *words)

    refused(tmp_path / "missing.txt", "does not exist")
    refused(tmp_path, "is a folder")
    for content, word in (
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"a\0b", "NUL"),
        (b"\xe9t\xe9", "UTF-8"),
    ):
        file = tmp_path / "bad"
        file.write_bytes(content)
        refused(file, word)
    refused("a\0b", "cannot be read")
    if os.geteuid() != 0:  # root reads everything
        file.chmod(0)
        refused(file, "cannot be read")


def test_documents_without_an_end(ask: Any, monkeypatch: pytest.MonkeyPatch, document: Path) -> None:
    monkeypatch.setattr("launch.terminal.document.LIMIT_BYTES", 100)
    for name in ("/dev/zero", str(document)):
        ask("-d", name).refused("longer than 100 bytes", name)


def test_a_document_needs_a_question(apb: Any, document: Path) -> None:
    apb("ask", "-d", str(document)).refused("needs a question", "-q")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_damaged_model_files(ask: Any, model: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    file = broken / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    ask(f"model={broken}").refused(name)


def test_what_does_not_fit_starts_no_host(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.verbs.prefill.ask.Engine.launch", lambda *a, **k: pytest.fail("hosts were started"))
    monkeypatch.setattr("launch.verbs.prefill.prepare.available_bytes", lambda device: 1_000_000)
    ask().refused("does not fit", "0.0 GB free")
