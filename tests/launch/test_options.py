"""One declaration of every option: docs/options.md, the engine's parameters, and presets that set them."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from apb.decode.base import Decoded, Decoder, Decoding
from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from burst.errors import UserError
from burst.registry import Registry, option
from launch.command.reference import reference
from launch.config.compose import compose
from launch.config.groups import GROUPS, Decoders
from launch.verbs.base import VERBS

pytest_plugins = ("tests.support.command",)
ROOT = Path(__file__).parents[2]
FITS = {"headline": "bench", "laptop": "ask", "long": "plan"}


def test_the_page_of_options_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == reference()


def test_the_engine_has_a_parameter_for_every_option() -> None:
    parameters = inspect.signature(Engine.launch).parameters
    hints = typing.get_type_hints(Engine.launch)
    fields = typing.get_type_hints(EngineOptions)
    for field in dataclasses.fields(EngineOptions):
        assert parameters[field.name].default == field.default, field.name
        if field.name != "model":  # or a Setup, which has settled the others
            assert hints[field.name] == fields[field.name], field.name
    assert set(parameters) == {"cluster", "cluster_options", *fields}  # and those of the cluster named


@pytest.mark.parametrize(
    ("words", "heavy"),
    [("--help", ("torch", "hydra", "rich")), ("ask --help", ("transformers", "hydra", "ray", "rich"))],
)
def test_help_imports_little(words: str, heavy: tuple[str, ...]) -> None:
    run = f"import sys; from launch.cli import main; main({words.split()!r})"
    code = f"{run}; sys.exit(any(name in sys.modules for name in {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_every_preset_fits_a_verb() -> None:
    assert set(FITS) == set(GROUPS["experiment"].names())
    for name, verb in FITS.items():
        compose(VERBS.get(verb)().schema(), [f"experiment={name}"])


def test_an_option_of_a_decoder_that_another_of_that_name_hides() -> None:
    decoders: Registry[type[Decoder]] = Registry("decoder", "apb.decode", "decode")

    @decoders.register("hiding", "draws in its own way")
    @dataclasses.dataclass(frozen=True)
    class Hiding(Decoder):
        seed: int = option(5, "of its own")

        def generate(self, decoding: Decoding) -> Decoded:
            raise NotImplementedError

    with pytest.raises(UserError, match=r"'hiding' names an option .*decode\.seed"):
        Decoders(decoders).options("hiding")
    assert "match" in [each.name for each in GROUPS["decode"].options("lookup")]


def test_a_preset_chooses_and_the_command_line_has_the_last_word() -> None:
    schema = VERBS.get("bench")().schema()
    found = compose(schema, ["experiment=headline", "bench.repeats=2", "network=nvlink"])
    assert found.name == "emulate" and found.values["network"]["name"] == "nvlink"
    assert found.values["bench"]["warmup_tokens"] == 400 and found.values["bench"]["repeats"] == 2
    asked = VERBS.get("ask")().schema()
    assert compose(asked, ["experiment=laptop"]).values["cluster"] == {"name": "virtual", "hosts": 2, "threads": None}
    assert compose(asked, ["experiment=laptop", "experiment=null"]).values["cluster"]["name"] == "ray"


@pytest.mark.parametrize("words", [["experiment=headline"], ["experiment=long"], ["experiment=headlin"]])
def test_presets_that_do_not_fit(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"preset sets|do not fit|unknown experiment"):
        compose(VERBS.get("ask")().schema(), words)


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    """A user's own presets; the folder's name has a space and '='."""
    folder = tmp_path / "my = presets, all"
    for name, text in {
        "experiment/mine": "# @package _global_\ndefaults:\n  - override /network: slow\n",
        "experiment/asks": "# @package _global_\n# mine\ndefaults:\n  - override /strategy: short\ncompare: true\n",
        "strategy/short": "name: apb\npassing_len: 7\n",
        "network/slow": "name: slow\ninter_us: 1000.0\n",
        "model/tiny": "name: tiny\nconfig:\n  model_type: llama\n  hidden_size: 64\n",
        "experiment/broken": "a: [",
        "experiment/loop": "# @package _global_\ncompare: ${compare}\n",
        "experiment/typed": "# @package _global_\nstrategy: 3\n",
        "experiment/binary": "\0",
    }.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_presets_of_a_folder(presets: Path) -> None:
    asked = VERBS.get("ask")().schema()
    found = compose(asked, ["experiment=asks", "model=tiny"], presets).values
    assert found["strategy"]["passing_len"] == 7 and found["strategy"]["passing"] == "ring" and found["compare"] is True
    assert found["model"]["config"]["hidden_size"] == 64
    assert compose(asked, ["strategy=short", "strategy.cost=0.1"], presets).values["strategy"]["cost"] == 0.1
    schema = VERBS.get("bench")().schema()
    found = compose(schema, ["bench=emulate", "network=slow", "bench.tokens=8"], presets).values
    assert found["network"]["inter_us"] == 1000.0 and found["network"]["hosts_per_node"] == 8


@pytest.mark.parametrize("name", ["mine", "broken", "loop", "typed", "binary"])
def test_presets_of_a_folder_that_cannot_be_used(presets: Path, name: str) -> None:
    with pytest.raises(UserError):
        compose(VERBS.get("ask")().schema(), [f"experiment={name}"], presets)


def test_folders_without_presets(apb: Any, ask: Any, presets: Path, tmp_path: Path) -> None:
    ask("--config-dir", str(presets), "experiment=short").refused("unknown experiment", "asks")
    ask("--config-dir", str(tmp_path / "nowhere")).refused("no such folder")
    ask("--config-dir", str(presets / "strategy")).refused("holds none")
    (presets / "strategy" / "apb.yaml").write_text("name: apb\n")
    ask(f"--config-dir={presets}").refused("has the name")
    apb("ask", "--config-dir").refused("--config-dir DIR")
