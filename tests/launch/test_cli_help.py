"""Help, version, verbs, and the configuration files that they describe."""

from __future__ import annotations

import dataclasses
import os
import sys
from importlib import resources
from typing import Any

import pytest
import yaml

from apb.clusters import launcher
from apb.compress import COMPRESSORS, compressor
from apb.decode import DECODERS, decoder
from apb.draft.spec import DraftSpec
from apb.strategies import STRATEGIES, strategy
from launch.cli import main
from launch.config.settings import DecodeSettings
from launch.verbs.verbs import VERBS

pytest_plugins = ("tests.support.command",)


def test_help_at_every_level(apb: Any) -> None:
    ran = apb("--help")
    assert ran.code == 0 and all(verb in ran.out for verb in VERBS)
    for verb in VERBS:
        ran = apb(verb, "-h")
        assert ran.code == 0 and f"apb {verb}" in ran.out
    text = apb("ask", "cluster=virtual", "--help").out
    for part in (
        "-d, --document",
        "strategy.anchor_len=null",
        "cluster.hosts=null",
        "decode.top_p=1.0",
        "needle_depth=0.5",
    ):
        assert part in text


def test_version(apb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    ran = apb("--version")
    assert ran.code == 0 and ran.out == "apb 1.2.3\n"


def test_verbs_that_are_no_verbs(apb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    apb().refused("no verb given")
    apb("askk").refused("Did you mean ask")
    apb("bench", "one", "two").refused("'two'")
    apb("serve", "-q", "Who?").refused("takes no -q")
    apb("serve", "-m").refused("takes no -m")
    monkeypatch.setitem(VERBS, "serve", dataclasses.replace(VERBS["serve"], target="launch.no_such_module:run"))
    apb("serve").refused("not built yet", "serve")
    assert apb("--help").out.count("over HTTP (not built yet)") == 1
    assert "over HTTP (not built yet)" in apb("serve", "--help").out


def test_configuration_files_name_exactly_the_options() -> None:
    def keys(path: str) -> set[str]:
        return set(yaml.safe_load(resources.files("conf").joinpath(path).read_text()))

    def options(kind: Any) -> set[str]:
        return {f.name for f in dataclasses.fields(kind)}

    for name in STRATEGIES:
        assert keys(f"strategy/{name}.yaml") == {"name", *options(strategy(name))}
    for name in COMPRESSORS:
        assert keys(f"compress/{name}.yaml") == {"name", *options(compressor(name))}
    for name in ("ray", "virtual", "torchrun"):
        assert keys(f"cluster/{name}.yaml") == {"name", *options(launcher(name))}
    shared = options(DecodeSettings) - {"decoder", "draft"}
    assert keys("decode/autoregressive.yaml") == shared
    for name in set(DECODERS) - {"autoregressive"}:
        kind = decoder(name)
        own = {"defaults", "name", *options(kind), *(options(DraftSpec) if kind.needs_head else ())}
        assert keys(f"decode/{name}.yaml") == own
        assert not own & shared - {"name"}  # a setting means the same with every decoder


def test_every_setting_is_explained() -> None:
    from launch.verbs.help import verb_help

    for verb in ("ask", "plan", "train"):
        for line in verb_help(verb).splitlines():
            word, _, rest = line.strip().partition(" ")
            assert "=" not in word or "CHOICE" in word or rest, line


def test_a_reader_that_leaves_early(monkeypatch: pytest.MonkeyPatch) -> None:
    back, front = os.pipe()
    os.close(back)
    with os.fdopen(front, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["--help"]) == 0
