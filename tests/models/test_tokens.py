"""Tokenizers as loaded against their tokenizer.json: the file's own tokens, or a rejection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama import LlamaTokenizer

from apb.models import load_tokenizer
from burst.errors import UserError
from tests.support.tiny import byte_tokenizer, llama_config

CODE = "def f(x):\n    return x"


def saved(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Write a tokenizer and what tokenizer_config.json says of it."""
    llama_config().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words | config))
    return folder


def pieces(*, prefix: bool) -> Tokenizer:
    """Return a SentencePiece-like BPE with bytes to fall back on, a space put before texts or not."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    made.train_from_iterator(["the red lamp was lit by Orrin in 1871, it's a cafe. def f(x): return x"] * 20, trainer)
    return made


def own(folder: Path) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(CODE, add_special_tokens=False).ids
    return ids


def test_a_byte_level_file_read_as_pieces_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m", byte_tokenizer().backend_tokenizer)
    # What releases before the mending one do.
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", LlamaTokenizer.from_pretrained)
    assert LlamaTokenizer.from_pretrained(folder).encode(CODE, add_special_tokens=False) != own(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(CODE, add_special_tokens=False) == own(folder)
    assert tokenizer.decode(own(folder)) == CODE and tokenizer.eos_token == "</s>"


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_byte_level_files_have_their_own_tokens(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", byte_tokenizer().backend_tokenizer, tokenizer_class=name)
    assert load_tokenizer(folder).encode(CODE, add_special_tokens=False) == own(folder)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_files_of_pieces_have_their_own_tokens(name: str | None, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", pieces(prefix=True), tokenizer_class=name)
    assert load_tokenizer(folder).encode(CODE, add_special_tokens=False) == own(folder)


def test_a_space_before_texts_that_the_folder_asks_for_is_transformers_own_matter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", pieces(prefix=True), add_prefix_space=False)
    got = load_tokenizer(folder).encode(CODE, add_special_tokens=False)
    assert got == AutoTokenizer.from_pretrained(folder).encode(CODE, add_special_tokens=False) != own(folder)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_other_tokens_than_the_files_are_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", pieces(prefix=False), tokenizer_class=name)
    with pytest.raises(UserError, match=r"tokenizer.json.*PreTrainedTokenizerFast") as caught:
        load_tokenizer(folder)
    assert str(folder) in caught.value.message


def test_truncation_and_padding_in_the_file_are_not_compared(tmp_path: Path) -> None:
    backend = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    folder = saved(tmp_path / "m", backend, tokenizer_class="PreTrainedTokenizerFast")
    assert isinstance(load_tokenizer(folder), PreTrainedTokenizerFast)
