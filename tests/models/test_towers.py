"""Text towers of composite checkpoints: loaded whole under every generation's names, or rejected by what is missing."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from apb.engine.engine import Engine
from apb.models.checks import check_config
from apb.models.loading import generation_stop_ids, load_config, load_model, make_config
from apb.models.shape import model_shape
from apb.models.towers import TOWERS
from apb.prompt.prompt import Prompt, Question
from burst.errors import UserError
from tests.support.composites import COMPOSITES, composite, composite_config, plain, renamed, tensors, text_logits
from tests.support.tiny import byte_tokenizer

IDS_S = torch.arange(5, 75) % 250


def save(folder: Path, weights: dict[str, Tensor], config: Any) -> Path:
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> Any:
    return plain(load_model(folder, dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composite") / "gemma3"
    composite(composite_config("gemma3")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_tower_computes_what_its_composite_computes_for_text(name: str, tmp_path: Path) -> None:
    model = composite(composite_config(name))
    wanted_SV = text_logits(model, IDS_S)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    weights = tensors(tmp_path / "saved")
    folders = [save(tmp_path / p, renamed(weights, p), model.config) for p in ("older", "newer", "mixed")]
    for folder in (tmp_path / "saved", *folders):
        config = load_config(folder)
        assert type(config) is type(model.config.get_text_config())
        assert config.vocab_size == 256
        tower = load(folder)
        assert not any("vision" in n for n, _ in tower.named_modules())
        assert torch.allclose(text_logits(tower, IDS_S), wanted_SV, atol=1e-5)


def test_every_known_tower_is_compared() -> None:
    assert {name.partition("-")[0] for name in COMPOSITES} == TOWERS


def test_a_folder_says_of_the_text_model_what_only_the_composite_knows(gemma3: Path, tmp_path: Path) -> None:
    config = composite_config("mistral3")
    values = config.to_dict()
    values |= {"dtype": "bfloat16", "eos_token_id": [3, 4]}
    del values["text_config"]["dtype"], values["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    text = load_config(tmp_path)  # a folder without weights: as for a plan
    assert (text.model_type, text.dtype, text.tie_word_embeddings) == ("mistral", torch.bfloat16, True)
    assert generation_stop_ids(tmp_path) == (3, 4, 7)
    assert make_config(values).model_type == "mistral"
    assert model_shape(load_config(gemma3), torch.float32).max_positions == 512


@pytest.mark.parametrize("apart", [False, True])
def test_the_head_is_the_embedding_only_where_the_files_have_no_other(apart: bool, tmp_path: Path) -> None:
    config = composite_config("mistral3")
    config.tie_word_embeddings = not apart
    model = composite(config)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    values = json.loads(file.read_text())
    values["tie_word_embeddings"] = True  # as published: files beside it may hold a head all the same
    values["text_config"].pop("tie_word_embeddings", None)
    file.write_text(json.dumps(values))
    assert load_config(tmp_path / "saved").tie_word_embeddings is not apart
    assert torch.allclose(text_logits(load(tmp_path / "saved"), IDS_S), text_logits(model, IDS_S), atol=1e-5)


def test_what_is_left_out_is_not_warned_of(gemma3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = tensors(gemma3) | {f"mtp.layers.{i}.norm.weight": torch.ones(64) for i in range(3)}
    folder = save(tmp_path / "mtp", weights, composite_config("gemma3"))
    with caplog.at_level(logging.DEBUG):
        load(folder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.message for record in caplog.records if "outside its text tower" in record.message]


def _cut(weights: dict[str, Tensor], what: Callable[[str], bool]) -> dict[str, Tensor]:
    return {name: x for name, x in weights.items() if not what(name)}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (lambda n: n.endswith("layers.2.self_attn.q_norm.weight"), "lacks the tensor model.layers.2.self_attn.q_norm"),
        (lambda n: n.endswith("language_model.model.norm.weight"), "lacks the tensor model.norm.weight"),
        (lambda n: n.endswith("embed_tokens.weight"), "lacks the tensor model.embed_tokens.weight"),
        (lambda n: ".layers.3." in n, "lacks the tensor model.layers.3"),
        (lambda n: n.startswith("language_model."), "holds no text tower"),
    ],
)
def test_missing_tensors_are_named(gemma3: Path, tmp_path: Path, missing: Callable[[str], bool], message: str) -> None:
    folder = save(tmp_path / "cut", _cut(tensors(gemma3), missing), composite_config("gemma3"))
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder / "model.safetensors") in str(caught.value)
    assert "Copy or download" in caught.value.remedy


def test_an_index_that_misses_tensors_is_named(tmp_path: Path) -> None:
    composite(composite_config("qwen3_5")).save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    index = tmp_path / "saved" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"]["model.language_model.layers.0.linear_attn.A_log"]
    index.write_text(json.dumps(values))
    # transformers reads whole shards, the index notwithstanding: the tensor is there, and so is the model.
    load(tmp_path / "saved")
    shard = index.with_name(values["weight_map"]["model.language_model.embed_tokens.weight"])
    values["weight_map"] = {name: file for name, file in values["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"lacks the tensor model\.embed_tokens\.weight"):
        load(tmp_path / "saved")


def test_a_tensor_under_two_names_is_rejected(gemma3: Path, tmp_path: Path) -> None:
    weights = tensors(gemma3)
    weights["model.language_model.norm.weight"] = weights["language_model.model.norm.weight"] + 1
    with pytest.raises(UserError, match=r"two kinds of names for norm\.weight") as caught:
        load(save(tmp_path / "twice", weights, composite_config("gemma3")))
    assert caught.value.given == "language_model.model.norm.weight and model.language_model.norm.weight"


def test_a_layer_with_two_prefixes_is_rejected(tmp_path: Path) -> None:
    model = composite(composite_config("qwen3_5_moe"))
    model.save_pretrained(tmp_path / "saved")
    old, new = (f"{prefix}.layers.1.mlp.experts.2." for prefix in ("model.language_model", "language_model.model"))
    weights = {name.replace(old, new): x for name, x in tensors(tmp_path / "saved").items()}
    assert any(name.startswith(new) for name in weights)
    with pytest.raises(UserError, match=r"two kinds of names for layers\.1 of its text tower"):
        load(save(tmp_path / "split", weights, model.config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.PaliGemmaConfig(), "other inputs than text"),
        (lambda: transformers.Qwen2AudioConfig(), "other inputs than text"),
        (lambda: transformers.MusicgenConfig, "is_encoder_decoder"),
        (lambda: composite_config("gemma3", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (lambda: composite_config("gemma4", use_bidirectional_attention="all"), "use_bidirectional_attention"),
    ],
)
def test_what_is_no_tower_is_rejected(config: Callable[[], Any], message: str, tmp_path: Path) -> None:
    made = config()
    if made is transformers.MusicgenConfig:
        parts = ("text_encoder", transformers.T5Config), ("audio_encoder", transformers.EncodecConfig)
        values = {name: kind().to_dict() for name, kind in parts}
        made = made(**values, decoder=transformers.MusicgenDecoderConfig().to_dict())
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        check_config(load_config(tmp_path))


def test_composites_that_let_images_alone_see_ahead_are_towers(tmp_path: Path) -> None:
    composite_config("gemma4", use_bidirectional_attention="vision").save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == "gemma4_text"


def test_hosts_prefill_the_tower_of_a_composite(tmp_path: Path) -> None:
    model = composite(composite_config("llava", vocab_size=300, max_position_embeddings=4096))
    model.save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(byte_tokenizer())
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with Engine.launch(str(tmp_path), hosts=3, strategy="ring", dtype="float32") as engine:
        handle = engine.prefill("the king of the hill sees the sea " * 5, "Who sees the stars?")
        assert handle.prompt.chat
        wanted = text_logits(model, torch.tensor(handle.prompt.token_ids))[-1]
        assert torch.allclose(engine.logits(handle), wanted, atol=1e-4)
        assert len(engine.generate(handle, 4).token_ids) <= 4


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral3-ministral3"])
def test_hosts_prefill_towers_with_windows_and_chunks(name: str, tmp_path: Path) -> None:
    model = composite(composite_config(name, vocab_size=300))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = tuple((7 * i) % 290 + 5 for i in range(126))
    prompt = Prompt(ids[:120], 5, Question((), ids[120:], (), None))
    with Engine.launch(str(tmp_path), hosts=3, strategy="ring", dtype="float32") as engine:
        found_V = engine.logits(engine.prefill(prompt))
    assert torch.allclose(found_V, text_logits(model, torch.tensor(ids))[-1], atol=1e-4)


@pytest.mark.parametrize("kind", [transformers.DeepseekV32Config, transformers.GlmMoeDsaConfig])
def test_sparse_indexers_are_rejected(kind: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match="index_topk"):
        check_config(kind())


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_unknown_layer_types_are_rejected_by_the_file(name: str, tmp_path: Path) -> None:
    composite_config(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["layer_types"] = ["full_attention", "telepathy"] * 2
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json cannot be used|layer_types"):
        check_config(load_config(tmp_path))
