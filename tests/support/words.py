"""Tokenizers and chat templates of the forms that published models have, trained on a few lines."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
CONTROL = ["<|User|>", "<|Assistant|>", "<tool_response>", "</tool_response>"]  # added, not special
BLANKS = ["\n\n", "\n\n\n", "  ", "    "]  # added, not special, and text
LINES = [
    "The harbour has lamps.\n\nWho lit them? The red lamp was lit by Orrin.\n\n[1] user: assistant said so.\n",
    "Lamps, lamps!\n\n\nWho? \n It's 1234 metres  to the sea; the sea is    blue.\n\n",
] * 20
_LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _byte_level(split: str | None, trim: bool, prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    made.pre_tokenizer = level
    if split is not None:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, show_progress=False, special_tokens=SPECIAL
    )
    made.train_from_iterator(LINES, trainer)
    return made


def _metaspace(scheme: str, split: bool) -> Tokenizer:
    """SentencePiece's BPE with byte fallback."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=160, show_progress=False, special_tokens=SPECIAL)
    made.train_from_iterator(LINES, trainer)
    description = json.loads(made.to_str())
    vocab = description["model"]["vocab"]
    vocab |= {byte: len(vocab) + i for i, byte in enumerate(_BYTES)}
    return Tokenizer.from_str(json.dumps(description))


def _legacy() -> Tokenizer:
    """Llama 2's: a normalizer puts the space before every stretch between special tokens, and nothing splits."""
    made = _metaspace("never", False)
    made.pre_tokenizer = None  # type: ignore[assignment]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def _unigram(scheme: str) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>")
    made.train_from_iterator(LINES, trainer)
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, show_progress=False, special_tokens=SPECIAL)
    )
    return made


FORMS: dict[str, Any] = {
    "gpt2": lambda: _byte_level(None, True),
    "roberta": lambda: _byte_level(None, True, prefix=True),
    "llama3": lambda: _byte_level(_LLAMA3, False),
    "bytes in one": lambda: _byte_level(r"[\s\S]+", False),
    "metaspace always": lambda: _metaspace("always", True),
    "metaspace first": lambda: _metaspace("first", False),
    "metaspace never": lambda: _metaspace("never", False),
    "legacy": _legacy,
    "unigram always": lambda: _unigram("always"),
    "unigram first": lambda: _unigram("first"),
    "wordpiece": _word_piece,
}
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "inst": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "trims": "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "<|im_start|>assistant\n\n",
    "words": "{{ bos_token }}{% for m in messages %}{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' }}"
    "{{ m.content }}{% endfor %}<|Assistant|>",
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content.strip() }}\n{% endfor %}assistant:",
    "tools": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}<tool_response>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@functools.cache
def words(form: str, template: str, control: tuple[str, ...] = tuple(CONTROL), blanks: bool = True) -> Any:
    """Return a tokenizer of a form, its control words added, with a chat template."""
    made = PreTrainedTokenizerFast(tokenizer_object=FORMS[form](), unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    made.add_tokens([AddedToken(word, special=False, normalized=False) for word in control])
    if blanks:
        made.add_tokens([AddedToken(blank, special=False, normalized=False) for blank in BLANKS])
    made.chat_template = TEMPLATES[template]
    return made
