"""Model folders with code of their own: nothing of it runs, nothing is asked, and auto_map is named."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from apb.models import load_config, load_model, load_tokenizer
from apb.models.loading import make_config
from burst.errors import UserError
from tests.support.tiny import saved_llama

CODE = "open({marker!r}, 'w').write('run')\nraise SystemExit('code of the folder')\n"
NAMES = (
    "lamp",
    "configuration_lamp",
    "modeling_lamp",
    "tokenization_lamp",
    "processing_lamp",
    "custom_generate/generate",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved_llama(tmp_path_factory.mktemp("code") / "plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good model's folder with code beside it; whoever asks, gets a yes, and fails the test."""
    made = shutil.copytree(plain, tmp_path / "m")
    for name in NAMES:
        file = made / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(CODE.format(marker=str(tmp_path / "CODE_RAN")))
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(made)
    yield made  # type: ignore[misc]
    assert not asked and not (tmp_path / "CODE_RAN").exists()


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | values))


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a kind of its own": ("config.json", {"model_type": "lamp", "auto_map": {"AutoConfig": "lamp.LampConfig"}}),
    "a class of its own": (
        "config.json",
        {"architectures": ["LampForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_lamp.Lamp"}},
    ),
    "no decoder of transformers'": (
        "config.json",
        {"model_type": "vit", "architectures": None, "auto_map": {"AutoModelForCausalLM": "modeling_lamp.Lamp"}},
    ),
    "from another repository": (
        "config.json",
        {"model_type": "lamp", "auto_map": {"AutoConfig": "some/where--lamp.LampConfig"}},
    ),
    "a list": ("config.json", {"model_type": "lamp", "auto_map": ["lamp.LampConfig"]}),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "LampTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_lamp.Lamp", None]}},
    ),
    "tokenizer without a class": (
        "tokenizer_config.json",
        {"tokenizer_class": None, "auto_map": {"AutoTokenizer": [None, "tokenization_lamp.Lamp"]}},
    ),
    "tokenizer, as older files have it": (
        "tokenizer_config.json",
        {"tokenizer_class": "LampTokenizer", "auto_map": ["tokenization_lamp.Lamp", None]},
    ),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "processing_lamp.Lamp"}}),
    "image processor": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "processing_lamp.Lamp"}}),
    "generation": ("generation_config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_lamp.Lamp"}}),
}
LOADERS: dict[str, Callable[[Path], object]] = {
    "setup": lambda path: Setup.make(EngineOptions(str(path), hosts=1, strategy="full")),
    "config": load_config,
    "tokenizer": load_tokenizer,
    "weights": lambda path: load_model(path, dtype="float32", device="cpu"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_needs_its_own_code_is_refused_by_every_loader(name: str, loader: str, folder: Path) -> None:
    file, values = REFUSED[name]
    change(folder / file, **values)
    with pytest.raises(UserError, match="auto_map"):
        LOADERS[loader](folder)


def test_code_beside_a_kind_of_transformers_own_is_left_alone(folder: Path) -> None:
    change(
        folder / "config.json",
        auto_map={"AutoConfig": "lamp.LampConfig", "AutoModelForCausalLM": "modeling_lamp.Lamp"},
        custom_pipelines={"lamp": {"impl": "lamp.Lamp"}},
    )
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        auto_map={"AutoTokenizer": ["tokenization_lamp.Lamp", "tokenization_lamp.Lamp"]},
    )
    assert type(load_model(folder, dtype="float32", device="cpu")).__module__.startswith("transformers.")
    setup = Setup.make(EngineOptions(str(folder), hosts=1, strategy="full"))
    assert type(setup.tokenizer).__module__.startswith("transformers.") and not hasattr(load_config(folder), "auto_map")


def test_values_that_need_code_are_refused() -> None:
    with pytest.raises(UserError, match="auto_map"):
        make_config({"model_type": "lamp", "auto_map": {"AutoConfig": "lamp.LampConfig"}})


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "some-org/some-kernel", "paged|eager", "no"]
)
def test_the_attention_that_a_configuration_names_is_not_loaded(name: str, folder: Path) -> None:
    for key in ("_attn_implementation", "attn_implementation", "_experts_implementation"):
        change(folder / "config.json", **{key: name})
    Setup.make(EngineOptions(str(folder), hosts=1, strategy="full"))
    load_model(folder, dtype="float32", device="cpu")


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="some/where")
    with pytest.raises(UserError, match="adapter"):
        load_model(folder, dtype="float32", device="cpu")
