"""Help, version, verbs, and the settings that they describe."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from apb.decode import DECODERS
from burst.registry import options
from launch.cli import main
from launch.command.help import verb_help
from launch.config.compose import compose
from launch.config.groups import GROUPS
from launch.config.settings import DecodeSettings
from launch.verbs.base import VERBS

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


def test_verbs_that_are_no_verbs(apb: Any) -> None:
    apb().refused("no verb given")
    apb("askk").refused("Did you mean ask")
    apb("serve").refused("unknown verb 'serve'")
    apb("bench", "one", "two").refused("'two'")
    apb("bench").refused("no benchmark named", "ruler")
    apb("bench", "rulers").refused("Did you mean ruler")
    apb("train", "-q", "Who?").refused("takes no -q")
    apb("bench", "ruler", "-d", "file").refused("takes no -d")


@pytest.mark.parametrize("name", ["attention", "decode", "emulate"])
def test_help_of_one_benchmark(apb: Any, name: str) -> None:
    text = apb("bench", name, "--help").out
    assert f"apb bench {name}: " in text and "bench.save=false" in text
    assert ("bench.strategies=" in text) == (name == "emulate") == ("network=CHOICE" in text)
    assert ("decode=CHOICE" in text) == (name == "decode")


@pytest.mark.parametrize("group", ["strategy", "compress", "cluster", "decode"])
def test_implementations_are_known_without_files(group: str) -> None:
    for name in GROUPS[group].names():
        values = compose(VERBS.get("ask")().schema(), [f"{group}={name}"]).values[group]
        assert set(values) == {"name", *(option.name for option in GROUPS[group].options(name))}


@pytest.mark.parametrize("verb", ["train", "bench"])
def test_names_are_known_without_files(verb: str) -> None:
    schema = VERBS.get(verb)().schema()
    assert compose(schema, []).name == schema.default
    for name in schema.named:
        found = compose(schema, [f"{verb}={name}"])
        assert found.name == name and {c.group for c in schema.choices(name) if c.default} <= set(found.values)


def test_settings_of_decoders_mean_the_same() -> None:
    shared = {option.name for option in options(DecodeSettings)}
    for name in DECODERS:
        assert not shared & {option.name for option in GROUPS["decode"].own(name)}


def test_every_setting_is_explained() -> None:
    for verb in VERBS:
        schema = VERBS.get(verb)().schema()
        for name in [None, *schema.named]:
            assert all(option.help for option in schema.options(name).values())
        for group in schema.groups():
            for choice in GROUPS[group].names():
                assert GROUPS[group].summary(choice)
                assert all(option.help for option in GROUPS[group].options(choice))


def test_help_fits_into_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for verb in VERBS:
        for line in verb_help(VERBS.get(verb)()).splitlines():
            assert len(line) <= 80 or "=" in line or "apb" in line, line


def test_a_reader_that_leaves_early(monkeypatch: pytest.MonkeyPatch) -> None:
    back, front = os.pipe()
    os.close(back)
    with os.fdopen(front, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["--help"]) == 0
