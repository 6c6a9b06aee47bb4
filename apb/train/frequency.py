"""Counting a corpus for a draft vocabulary: text, or the target's own answers as ``apb train eagle`` keeps them.

Shapes: W whole vocabulary, S tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apb.draft import vocab
from apb.prompt.prompt import encode
from apb.prompt.template import render
from burst.errors import UserError

_PIECE = 50_000  # characters that are tokenised at once
_TURN = "\ue000answer\ue001"  # stands for what the assistant says while the chat template is filled in


def stop_tokens(tokenizer: Any, generation_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the ids that end an answer: the generation configuration's, and what ends the assistant's turn."""
    found = list(generation_ids)
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _TURN}]
        _, _, after = render(tokenizer, [said], add_generation_prompt=False)[0].partition(_TURN)
        ending = encode(tokenizer, after.lstrip(), special=True)[:1]
        found += [i for i in ending if i in tokenizer.all_special_ids]
    return tuple(dict.fromkeys(found))


def count_text(tokenizer: Any, text: str, size: int, on_piece: Callable[[int, int], None]) -> Tensor:
    """Return how often each of ``size`` ids occurs in a text (W,); ``on_piece(characters, all)``."""

    def pieces() -> Iterator[Tensor]:
        start = 0
        while start < len(text):
            end = text.find("\n", start + _PIECE) + 1 or len(text)
            on_piece(start, len(text))
            yield torch.tensor(encode(tokenizer, text[start:end], special=False), dtype=torch.int64)
            start = end
        on_piece(start, start)

    return vocab.count(pieces(), size)


def count_answers(file: Path, size: int) -> Tensor:
    """Return how often each of ``size`` ids occurs in a file of answers (W,); raises UserError when it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _no_answers(file, str(error)) from error
    wrong = [p for p in parts if p.dtype != torch.int32 or p.dim() != 1 or (len(p) and not 0 <= int(p.max()) < size)]
    if wrong or not parts:
        raise _no_answers(file, f"it holds no token ids below {size}")
    return vocab.count(parts, size)


def _no_answers(file: Path, what: str) -> UserError:
    return UserError(
        f"the answers {file} cannot be counted: {what}",
        given=f"-d {file}",
        allowed="answers.safetensors of 'apb train eagle' for the same model, or a text file",
        remedy="Give the folder's answers.safetensors, or a text.",
    )
